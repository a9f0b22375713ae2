"""What an export needs on the Hugging Face hub.

card      the model card, README.md, with the run's facts
curves    the picture beside it
push      uploading an export
"""
