"""Result files and what is made of them: tables, plots and HTML pages."""
