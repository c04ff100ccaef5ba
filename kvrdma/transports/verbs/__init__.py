"""One-sided READ and WRITE of RDMA devices, through libibverbs."""
