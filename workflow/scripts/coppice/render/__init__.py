"""How numbers, figures and pages look. Nothing here depends on a particular study."""
