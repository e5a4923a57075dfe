"""SMTC written a second time, from the specification alone, and compared with the package."""
