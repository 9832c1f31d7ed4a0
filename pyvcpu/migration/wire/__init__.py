"""QEMU's migration stream as bytes: readers and writers that do no I/O of their own."""
