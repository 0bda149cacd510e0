//! The products of [`GradientTile`](super::GradientTile) on tiles, for bfloat16 tensors at levels that have them.
//!
//! Values and gradients of outputs enter as they are stored, weights and gradients of logits rounded to bfloat16, as in torch's
//! backward; sums are in float32. What a key or a query gets from a tile of queries is added number by number to what it has, whatever
//! else is in the batch: so one pass and two give the same bits here too.

use std::ops::Range;

use half::bf16;

use super::bf16::{copy_rows, pairs};
use super::gradient_tile::{GradientTile, KeySums};
use super::key_batch::{KeyBatch, KeySource};
use super::{Bf16Logits, float32};
use crate::exec::Buffer;
use crate::kernels::{Matrix, MatrixMut, RoundColumns, RoundLines, TmulGemm, TmulInit, all_finite, room_for_rows};
use crate::mra::problem::Problem;
use crate::simd::{Element, Scalar, TILE_DEPTH, TmulUnit};

/// A tile of queries with the gradients of their outputs, packed, and the buffers of a step.
pub(crate) struct TmulGradient {
    value_dim: usize,
    /// Of a key and of a value, rounded up to whole vectors.
    widths: [usize; 2],
    columns: usize,
    /// The gradients of outputs: pairs of channels, a column for each query.
    grads: Buffer<bf16>,
    /// Pairs of queries: a column for each channel of a query, and of a gradient.
    zipped: [Buffer<bf16>; 2],
    /// Rows of the queries, or of the gradients.
    rows: Buffer<bf16>,
    /// Pairs of keys, a column for each channel.
    keys: Buffer<bf16>,
    /// Rounded numbers of pairs of a key and a query.
    rounded: Buffer<bf16>,
    /// Rows that are not whole tiles.
    room: Buffer<bf16>,
}

impl TmulGradient {
    /// Buffers for tiles of at most `columns` queries.
    pub(crate) fn new(problem: &Problem<'_>, columns: usize, value_dim: usize) -> Self {
        let keys = KeyBatch::<f32>::capacity(problem).next_multiple_of(TILE_DEPTH);
        let (queries, widths) =
            (columns.next_multiple_of(TILE_DEPTH), [problem.head_dim, value_dim].map(|dim| problem.padded::<f32>(dim)));
        Self {
            value_dim,
            widths,
            columns: 0,
            grads: Buffer::scratch(2 * pairs(value_dim, true) * columns),
            zipped: widths.map(|width| Buffer::scratch(queries * width)),
            rows: Buffer::scratch(columns * problem.head_dim.max(value_dim)),
            keys: Buffer::scratch(keys * widths[0]),
            rounded: Buffer::scratch(keys * queries),
            room: Buffer::scratch([value_dim, keys, queries].map(room_for_rows).into_iter().max().unwrap_or(0)),
        }
    }

    /// Starts a tile of these queries with the gradients of their outputs, with this many lanes.
    pub(crate) fn start<'a, E: Element>(
        &mut self,
        logits: &Bf16Logits,
        queries: impl ExactSizeIterator<Item = &'a [E]>,
        grads: impl ExactSizeIterator<Item = &'a [E]>,
        columns: usize,
    ) {
        self.columns = columns;
        let queries = copy_rows(queries.map(|row| E::as_bf16(row).expect("bfloat16")), &mut self.rows);
        logits.zip_all(queries, self.widths[0], &mut self.zipped[0]);
        let grads = copy_rows(grads.map(|row| E::as_bf16(row).expect("bfloat16")), &mut self.rows);
        logits.zip_all(grads, self.widths[1], &mut self.zipped[1]);
        logits.pack_all(grads, columns, &mut self.grads);
    }

    /// The products of the values of the keys of the logits and the gradients of outputs, one row for each key.
    pub(crate) fn values_times_grads(&mut self, logits: &Bf16Logits, values: Matrix<'_, bf16>, products: &mut [f32]) {
        let (columns, tokens) = (self.columns, &logits.tokens);
        unit(logits).run(TmulGemm {
            a: values,
            a_rows: Some(tokens),
            b: Matrix::new(&self.grads, pairs(self.value_dim, true), 2 * columns, 2 * columns),
            c: MatrixMut::new(products, tokens.len(), columns, columns),
            init: TmulInit::Scaled(1.0),
            room: &mut self.room,
        });
    }

    /// Adds to the gradients of keys (0) or values (1): `factors`, of which each key has a row, times rows of the queries or of their
    /// gradients. `places` says which rows lie together, and which row of `sums` is the first of them.
    pub(crate) fn add_to_keys(
        &mut self,
        logits: &Bf16Logits,
        which: usize,
        factors: &[f32],
        places: impl Iterator<Item = (Range<usize>, usize)>,
        sums: &mut [f32],
    ) {
        let (columns, keys, width) = (self.columns, logits.tokens.len(), self.widths[which]);
        let deep = columns.next_multiple_of(TILE_DEPTH);
        let from = Matrix::new(factors, keys, columns, columns);
        unit(logits).run(RoundLines { from, to: MatrixMut::new(&mut self.rounded, keys, deep, deep) });
        let b = Matrix::new(&self.zipped[which], deep / 2, 2 * width, 2 * width);
        for (rows, place) in places {
            let sums = &mut sums[place * width..];
            let a = Matrix::new(&self.rounded[rows.start * deep..], rows.len(), deep, deep);
            let (c, room) = (MatrixMut::new(sums, rows.len(), width, width), &mut self.room[..]);
            unit(logits).run(TmulGemm { a, a_rows: None, b, c, init: TmulInit::Keep, room });
        }
    }

    /// Adds to the gradients of the queries, a row for each of them: the gradients of their logits times the keys.
    pub(crate) fn add_to_queries(
        &mut self,
        logits: &Bf16Logits,
        (keys, tokens): (Matrix<'_, bf16>, &[u32]),
        gradients: &[f32],
        sums: MatrixMut<'_, f32>,
    ) {
        let columns = self.columns;
        let b = logits.zip(keys, tokens, self.widths[0], &mut self.keys);
        let deep = 2 * b.rows;
        let from = Matrix::new(gradients, tokens.len(), columns, columns);
        unit(logits).run(RoundColumns { from, to: MatrixMut::new(&mut self.rounded, columns, deep, deep) });
        let a = Matrix::new(&self.rounded, sums.rows, deep, deep);
        unit(logits).run(TmulGemm { a, a_rows: None, b, c: sums, init: TmulInit::Keep, room: &mut self.room });
    }
}

fn unit(logits: &Bf16Logits) -> &TmulUnit {
    logits.tmul.as_ref().expect("a level with tiles")
}

impl<T: Scalar> GradientTile<T> {
    /// [`Self::add`] on tiles. An idle query adds nothing to keys, since it stands there as a row of zeros with weights of 0.
    pub(super) fn add_on_tiles<E: Element<Compute = T>>(
        &mut self,
        batch: &KeyBatch<T>,
        source: &KeySource<'_, E>,
        want_dq: bool,
        sums: Option<KeySums<'_, T>>,
        adjust: impl FnOnce(&mut [T], usize),
    ) {
        let (Some(logits), Some(tmul)) = (&mut self.bf16, &mut self.tmul) else { unreachable!("a level with tiles") };
        let (keys, values) = source.all_bf16().expect("bfloat16");
        logits.compute(batch, source, float32(&mut self.weights));
        tmul.values_times_grads(logits, values, float32(&mut self.gradients));
        // Lanes without a query are multiplied by 0, as those of idle ones.
        self.guard = (self.count < self.columns || self.any_idle()) && !is_finite(source, batch);
        self.finish_gradients(batch, source, adjust);
        let (Some(logits), Some(tmul)) = (&self.bf16, &mut self.tmul) else { unreachable!("a level with tiles") };
        let (weights, gradients) = (float32(&mut self.weights), float32(&mut self.gradients));
        if let Some(KeySums { dk, dv, first }) = sums {
            let places = || batch.spans().map(|(rows, number)| (rows, number - first));
            tmul.add_to_keys(logits, 0, gradients, places(), float32(dk));
            tmul.add_to_keys(logits, 1, weights, places(), float32(dv));
        }
        if !want_dq {
            return;
        }
        let (width, count) = (self.key_width, self.count);
        let before = if self.guard { self.dq[..count * width].to_vec() } else { Vec::new() };
        tmul.add_to_queries(
            logits,
            (keys, &logits.tokens),
            gradients,
            MatrixMut::new(float32(&mut self.dq), count, width, width),
        );
        if self.guard {
            for query in (0..count).filter(|&query| self.idle[query]) {
                let row = query * width..(query + 1) * width;
                self.dq[row.clone()].copy_from_slice(&before[row]);
            }
        }
    }
}

/// Whether there is no NaN and no infinity among the keys and values of a batch.
fn is_finite<T: Scalar, E: Element<Compute = T>>(source: &KeySource<'_, E>, batch: &KeyBatch<T>) -> bool {
    let (keys, values) = source.all_bf16().expect("bfloat16");
    let tokens = batch.spans().flat_map(|(rows, first)| (first..first + rows.len()).map(|number| source.token(number)));
    tokens.into_iter().all(|token| all_finite(keys.row(token)) && all_finite(values.row(token)))
}
