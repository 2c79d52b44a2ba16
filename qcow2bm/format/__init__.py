"""The qcow2 on-disk structures: bytes to values and back, with the specification's own field names. No I/O."""
