//! The products of [`Attend`](super::Attend) for bfloat16 tensors, at levels that multiply bfloat16 as it is, and the logits of
//! [`GradientTile`](super::GradientTile): at logits of 1e6 those of backward must be rounded as those of forward are.
//!
//! Queries, keys and values enter the products as they are stored, the weights rounded to bfloat16, as in torch's attention; sums are in
//! float32. The softmax between the products stays in float32: its sum is that of the weights before they are rounded, so that
//! their errors average out instead of being divided out.

use half::bf16;

use super::key_batch::{KeyBatch, KeySource};
use crate::exec::Buffer;
use crate::kernels::{AddValues, KeyDots, Matrix, MatrixMut, RoundRows, ZipRows, pack_channel_pairs};
use crate::mra::problem::Problem;
use crate::simd::{Bf16Level, Element, Scalar};

/// The logits of bfloat16 queries and keys.
pub(crate) struct Bf16Logits {
    level: Bf16Level,
    scale: f32,
    channels: usize,
    columns: usize,
    /// Pairs of channels, a column for each query of the tile.
    queries: Buffer<bf16>,
    /// The tokens of the batch of keys.
    tokens: Vec<u32>,
}

impl Bf16Logits {
    /// Buffers for tiles of at most `columns` queries; `None` if tensors of `E` are widened to float32 before they are multiplied.
    pub(crate) fn new<E: Element>(problem: &Problem<'_>, columns: usize) -> Option<Self> {
        E::as_bf16(&[])?;
        // Tokens are kept as 32 bits.
        u32::try_from(problem.key_len).ok()?;
        let level = Bf16Level::of(problem.level)?;
        Some(Self {
            level,
            scale: f32::from_f64(problem.scale),
            channels: problem.head_dim,
            columns: 0,
            queries: Buffer::scratch(problem.head_dim.div_ceil(2) * 2 * columns),
            tokens: Vec::new(),
        })
    }

    /// Starts a tile of these queries, with this many lanes.
    pub(crate) fn start<'a, E: Element>(&mut self, queries: impl ExactSizeIterator<Item = &'a [E]>, columns: usize) {
        self.columns = columns;
        let mut to = MatrixMut::new(&mut self.queries, self.channels.div_ceil(2), 2 * columns, 2 * columns);
        pack_channel_pairs(queries.map(|row| E::as_bf16(row).expect("bfloat16")), &mut to);
    }

    /// The logits of a batch of keys, one row for each of them.
    pub(crate) fn compute<T: Scalar, E: Element<Compute = T>>(
        &mut self,
        batch: &KeyBatch<T>,
        source: &KeySource<'_, E>,
        logits: &mut [f32],
    ) {
        let columns = self.columns;
        batch.read_tokens(source, &mut self.tokens);
        let (keys, _) = source.all_bf16().expect("bfloat16");
        self.level.run(KeyDots {
            keys,
            rows: &self.tokens,
            queries: Matrix::new(&self.queries, self.channels.div_ceil(2), 2 * columns, 2 * columns),
            scale: self.scale,
            logits: MatrixMut::new(logits, self.tokens.len(), columns, columns),
        });
    }
}

/// The buffers of the products of forward, all of them pairs of numbers.
pub(crate) struct Bf16Products {
    pub(crate) logits: Bf16Logits,
    /// Pairs of keys, a column for each query of the tile.
    weights: Buffer<bf16>,
    /// Pairs of keys, a column for each channel of a value.
    values: Buffer<bf16>,
}

impl Bf16Products {
    /// Buffers for tiles of at most `columns` queries; `None` if tensors of `E` are widened to float32 before they are multiplied.
    pub(crate) fn new<E: Element>(problem: &Problem<'_>, columns: usize, value_dim: usize) -> Option<Self> {
        let pairs_of_keys = KeyBatch::<f32>::capacity(problem).div_ceil(2);
        Some(Self {
            logits: Bf16Logits::new::<E>(problem, columns)?,
            weights: Buffer::scratch(pairs_of_keys * 2 * columns),
            values: Buffer::scratch(pairs_of_keys * 2 * problem.padded::<f32>(value_dim)),
        })
    }

    /// Multiplies the sums of each query by its factor, then adds the values of the keys whose logits were computed last, with these
    /// weights, one row for each key.
    pub(crate) fn add_values<E: Element>(
        &mut self,
        source: &KeySource<'_, E>,
        weights: &[f32],
        rescale: &[f32],
        sums: MatrixMut<'_, f32>,
    ) {
        let Bf16Logits { level, columns, ref tokens, .. } = self.logits;
        let (keys, width) = (tokens.len(), sums.cols);
        let pairs = keys.div_ceil(2);
        let (_, values) = source.all_bf16().expect("bfloat16");
        let to = MatrixMut::new(&mut self.values, pairs, 2 * width, 2 * width);
        level.run(ZipRows { from: values, rows: tokens, to });
        let from = Matrix::new(weights, keys, columns, columns);
        let to = MatrixMut::new(&mut self.weights, pairs, 2 * columns, 2 * columns);
        level.run(RoundRows { from, to });
        level.run(AddValues {
            weights: Matrix::new(&self.weights, pairs, 2 * columns, 2 * columns),
            values: Matrix::new(&self.values, pairs, 2 * width, 2 * width),
            rescale,
            sums,
        });
    }
}
