"""How numbers, figures and pages look. Knows no study."""
