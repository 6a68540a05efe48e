"""Pages, pictures and tables of a run or a result; no number in them is typed by hand."""
