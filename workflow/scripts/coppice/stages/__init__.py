"""The stages of a study: prune, select, recover, evaluate, compare. Each writes records and renders no report."""
