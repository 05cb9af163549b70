"""Reports rendered from records alone: the study's (`study_report`), and where a number comes from (`provenance`)."""
