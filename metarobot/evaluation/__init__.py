"""How well agents adapt: protocol, statistics, comparison, plots and tables."""
