"""The paper's tables: cells, jobs, and the text of a table."""
