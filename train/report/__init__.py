"""What a run or a result looks like to a person: a page, a picture, tables; none is typed by hand."""
