"""The operations of a hyper-connection as Triton kernels; importing this package imports triton.

Layouts, in every file: streams ``[T, n, C]`` and branch ``[T, C]`` row-major in their own dtype;
what there is per token and coefficient is float32 with the tokens last, ``[rows, T]``, so that
neighbouring lanes touch neighbouring addresses. ``raw`` has M + 1 rows (projection over RMS, then
1/RMS), ``packed`` has n*(n + 2): H_pre, H_post, then H_res row-major in ``res[o, i]``. T and C are
tokens and channels, K = n*C, M = 2n + R logits. NP and MP are n and M padded to a power of two.
"""
