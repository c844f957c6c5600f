"""The operator page: plain files, served as they are."""
