"""The matrices of parameters, as optimizers cut them out of leaves.

Everything is that of `jaxlib_ext.matrices`.
"""

from jaxlib_ext.matrices import MatrixAxes as MatrixAxes
from jaxlib_ext.matrices import Spec as Spec
from jaxlib_ext.matrices import from_last as from_last
from jaxlib_ext.matrices import join as join
from jaxlib_ext.matrices import resolve as resolve
from jaxlib_ext.matrices import sides as sides
from jaxlib_ext.matrices import split as split
