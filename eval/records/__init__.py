"""Read and write result files, and show their records as tables, plots and HTML pages."""
