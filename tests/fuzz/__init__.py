"""Hostile images, as many as wanted: whatever a file holds, a command ends, with an answer or with an error."""
