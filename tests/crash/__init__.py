"""What a power cut leaves: commands recorded operation by operation, and every state a disk may be in half-way."""
