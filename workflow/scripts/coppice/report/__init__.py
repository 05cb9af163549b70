"""Reports rendered from records alone: `study_report` covers the whole study, `provenance` the source of a number."""
