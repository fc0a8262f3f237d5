"""The report of `terncomm plot`: records in, one page with pictures and their numbers out."""
