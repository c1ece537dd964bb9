"""Files on local disks: how they are read and written (`localfile`), what they belong to (`identity`), and the block
store that the overlay keeps its blocks in (`blockmap`, `blockstore`)."""
