"""What every room uses: errors, files, JSON, credentials, the machine, formats of numbers and figures."""
