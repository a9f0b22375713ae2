"""From files, or the hub, to documents.

sources    which files are meant by a file, folder, glob, or Python's own library
content    a text file's content as UTF-8: unpacked, converted
records    the text of a record, and where it is cut into pieces
readers    records of plain text, JSON and CSV
tables     records of Parquet and Arrow files
hub        records of a data set on the hub
documents  all documents of a source, from any position on
"""
