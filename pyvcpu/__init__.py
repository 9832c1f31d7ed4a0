"""pyvcpu: an x86-64 virtual machine in pure Python with QEMU-style live migration."""

__version__ = "0.1.0"
