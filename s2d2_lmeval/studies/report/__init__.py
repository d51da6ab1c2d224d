"""From a folder of point files to tables, figures and a page."""
