"""The families that come with the package, a file for each layout."""
