"""The kernels: `attention`, which begins with Algorithm 1 of the paper, `rows` and `patches` in Triton; `hopper`, in
Gluon, for equal lengths on one kind of GPU. Triton is optional, so they are imported only where it is used."""
