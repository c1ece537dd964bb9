"""Everything that speaks FUSE. `channel` owns the device, `namespace` answers for directories and attributes through
pyfuse3, `dataplane` answers for bytes, `boundary` turns exceptions into errnos, `protocol` has the layouts."""
