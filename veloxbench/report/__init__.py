"""Reports: written from records alone; no number in them is typed by hand."""
