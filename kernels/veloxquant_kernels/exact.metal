// A product and a sum are two roundings: codes are compared bit for bit with plain MLX, which never fuses them.
#pragma clang fp contract(off)

