"""What every room uses: errors, files, JSON, credentials, the machine."""
