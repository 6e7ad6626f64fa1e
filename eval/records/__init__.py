"""Result files, and the tables, plots and HTML pages that show them."""
