"""The report: runs are collected (collect), compared (compare), drawn (figures, pictures) and laid out as one page (page)."""
