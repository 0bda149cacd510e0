//! Tensors in memory, in layouts that callers use.

use mra_attention::{Tensor, TensorMut};
use ndarray::{Array4, ArrayView4};

use super::Rounded;

/// How a tensor (batch, head, token, channel) lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// In the order of its dimensions.
    Contiguous,
    /// Tokens before heads, as projections leave them, and rows with a gap between them.
    TokensFirst,
    /// One head in memory, which all heads of all batch items share; only for inputs whose heads are equal.
    Expanded,
}

/// A tensor that starts full of NaN, gaps included.
pub(crate) struct Stored<E> {
    data: Vec<E>,
    shape: [usize; 4],
    strides: [usize; 4],
}

impl<E: Rounded> Stored<E> {
    /// Nothing but NaN: an output before it is written.
    pub(crate) fn unset((b, h, l, d): (usize, usize, usize, usize), layout: Layout) -> Self {
        let row = d + 3;
        let strides = match layout {
            Layout::Contiguous => [h * l * d, l * d, d, 1],
            Layout::TokensFirst => [l * h * row, row, h * row, 1],
            Layout::Expanded => [0, 0, row, 1],
        };
        let shape = [b, h, l, d];
        let len = if shape.contains(&0) {
            0
        } else {
            shape.iter().zip(strides).map(|(n, stride)| (n - 1) * stride).sum::<usize>() + 1
        };
        Self { data: vec![E::round(f64::NAN); len], shape, strides }
    }

    /// These numbers, rounded.
    pub(crate) fn new(array: ArrayView4<'_, f64>, layout: Layout) -> Self {
        let mut stored = Self::unset(array.dim(), layout);
        for (index, &x) in array.indexed_iter() {
            let place = stored.place(index);
            stored.data[place] = E::round(x);
        }
        stored
    }

    fn place(&self, (b, h, l, d): (usize, usize, usize, usize)) -> usize {
        [b, h, l, d].iter().zip(self.strides).map(|(index, stride)| index * stride).sum()
    }

    pub(crate) fn tensor(&self, name: &str) -> Tensor<'_, E> {
        Tensor::new(name, &self.data, self.shape, self.strides).expect("a tensor within its memory")
    }

    pub(crate) fn tensor_mut(&mut self, name: &str) -> TensorMut<'_, E> {
        TensorMut::new(name, &mut self.data, self.shape, self.strides).expect("a tensor within its memory, without overlap")
    }

    /// The elements, after a check that nothing was written between them.
    pub(crate) fn read(&self) -> Array4<E> {
        let [b, h, l, d] = self.shape;
        let mut gap = vec![true; self.data.len()];
        let array = Array4::from_shape_fn((b, h, l, d), |index| {
            gap[self.place(index)] = false;
            self.data[self.place(index)]
        });
        for (place, x) in self.data.iter().enumerate().filter(|&(place, _)| gap[place]) {
            assert!(x.exact().is_nan(), "{x:?} was written to place {place}, which lies in a gap between rows");
        }
        array
    }
}
