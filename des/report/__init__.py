"""The report: collect runs (collect), compare them (compare), draw figures (figures, pictures), and build one page (page)."""
