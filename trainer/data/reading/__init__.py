"""From files, or data sets on the hub, to documents.

sources    which files a source names: a file, folder, glob, or Python's standard library
content    a text file's content as UTF-8: decompressed and converted
records    the text of a record, and where a long one is cut into pieces
readers    records of plain text, JSON and CSV
tables     records of Parquet and Arrow files
hub        records of a data set on the hub
documents  all documents of a source, from any position
"""
