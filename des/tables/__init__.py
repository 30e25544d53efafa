"""The paper's tables: their cells, the jobs behind them, and the tables as text."""
