//! The products of [`Attend`](super::attend::Attend) for bfloat16 tensors, at levels that multiply bfloat16 as it is.
//!
//! Queries, keys and values enter the products as they are stored, the weights rounded to bfloat16, as in torch's attention; sums are in
//! float32. The softmax between the products stays in float32: its sum is that of the weights before they are rounded, so that
//! their errors average out instead of being divided out.

use half::bf16;

use super::problem::Problem;
use super::scratch::Buffer;
use super::strip::{KeySource, Strip};
use crate::kernels::{AddValues, KeyDots, Matrix, MatrixMut, RoundRows, ZipRows, pack_channel_pairs};
use crate::simd::{Bf16Level, Element, Scalar};

/// The buffers of the products, all of them pairs of numbers.
pub(crate) struct Bf16Products {
    level: Bf16Level,
    scale: f32,
    channels: usize,
    columns: usize,
    /// Pairs of channels, a column for each query of the tile.
    queries: Buffer<bf16>,
    /// The tokens of the strip.
    tokens: Vec<u32>,
    /// Pairs of keys, a column for each query of the tile.
    weights: Buffer<bf16>,
    /// Pairs of keys, a column for each channel of a value.
    values: Buffer<bf16>,
}

impl Bf16Products {
    /// Buffers for tiles of at most `columns` queries; `None` if tensors of `E` are widened to float32 before they are multiplied.
    pub(crate) fn new<E: Element>(problem: &Problem<'_>, columns: usize, value_dim: usize) -> Option<Self> {
        E::as_bf16(&[])?;
        // Tokens are kept as 32 bits.
        u32::try_from(problem.key_len).ok()?;
        let level = Bf16Level::of(problem.level)?;
        let pairs_of_keys = Strip::<f32>::capacity(problem).div_ceil(2);
        Some(Self {
            level,
            scale: f32::from_f64(problem.scale),
            channels: problem.head_dim,
            columns: 0,
            queries: Buffer::scratch(problem.head_dim.div_ceil(2) * 2 * columns),
            tokens: Vec::new(),
            weights: Buffer::scratch(pairs_of_keys * 2 * columns),
            values: Buffer::scratch(pairs_of_keys * 2 * problem.padded::<f32>(value_dim)),
        })
    }

    /// Starts a tile of these queries, with this many lanes.
    pub(crate) fn start<'a, E: Element>(&mut self, queries: impl ExactSizeIterator<Item = &'a [E]>, columns: usize) {
        self.columns = columns;
        let mut to = MatrixMut::new(&mut self.queries, self.channels.div_ceil(2), 2 * columns, 2 * columns);
        pack_channel_pairs(queries.map(|row| E::as_bf16(row).expect("bfloat16")), &mut to);
    }

    /// The logits of the keys of a strip, one row for each of them.
    pub(crate) fn logits<T: Scalar, E: Element<Compute = T>>(
        &mut self,
        strip: &Strip<T>,
        source: &KeySource<'_, E>,
        logits: &mut [f32],
    ) {
        let columns = self.columns;
        strip.read_tokens(source, &mut self.tokens);
        let (keys, _) = source.all_bf16().expect("bfloat16");
        self.level.run(KeyDots {
            keys,
            rows: &self.tokens,
            queries: Matrix::new(&self.queries, self.channels.div_ceil(2), 2 * columns, 2 * columns),
            scale: self.scale,
            logits: MatrixMut::new(logits, self.tokens.len(), columns, columns),
        });
    }

    /// Multiplies the sums of each query by its factor, then adds the values of the keys of [`Self::logits`] with these weights, one row
    /// for each key.
    pub(crate) fn add_values<E: Element>(
        &mut self,
        source: &KeySource<'_, E>,
        weights: &[f32],
        rescale: &[f32],
        sums: MatrixMut<'_, f32>,
    ) {
        let (keys, columns, width) = (self.tokens.len(), self.columns, sums.cols);
        let pairs = keys.div_ceil(2);
        let (_, values) = source.all_bf16().expect("bfloat16");
        let to = MatrixMut::new(&mut self.values, pairs, 2 * width, 2 * width);
        self.level.run(ZipRows { from: values, rows: &self.tokens, to });
        let from = Matrix::new(weights, keys, columns, columns);
        let to = MatrixMut::new(&mut self.weights, pairs, 2 * columns, 2 * columns);
        self.level.run(RoundRows { from, to });
        self.level.run(AddValues {
            weights: Matrix::new(&self.weights, pairs, 2 * columns, 2 * columns),
            values: Matrix::new(&self.values, pairs, 2 * width, 2 * width),
            rescale,
            sums,
        });
    }
}
