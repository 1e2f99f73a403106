"""Pages from records and verdicts: no number is typed by hand, and nothing here measures."""
