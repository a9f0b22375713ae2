"""`train --dry-run`: every part of a job once, on its real ranks, and nothing is left behind."""
