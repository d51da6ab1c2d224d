"""Reports: tables, figures and a page from a folder of point files."""
