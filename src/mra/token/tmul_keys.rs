//! A block of bfloat16 keys and the queries that compute it together, on tiles.
//!
//! Queries and keys are multiplied as they are stored, and values by weights that are rounded to bfloat16; between the products it is the
//! same softmax as elsewhere.

use half::bf16;

use super::coarse::State;
use crate::exec::Buffer;
use crate::kernels::{
    AddRowsAt, Matrix, MatrixMut, PackPairs, RoundLines, Softcap, TmulGemm, TmulInit, ZipRows, room_for_rows,
};
use crate::mra::attend::float32;
use crate::mra::problem::Problem;
use crate::simd::{Bf16Level, Element, Level, Scalar, TILE_DEPTH, TmulUnit};

/// Queries that go through all steps together: their logits, weights and products stay in the first-level cache.
pub(super) const QUERIES: usize = 64;

/// The block, packed, and the buffers of a step.
pub(super) struct TmulKeys<T> {
    level: Level,
    pairs_level: Bf16Level,
    unit: TmulUnit,
    scale: f32,
    softcap: Option<T>,
    /// Keys of the block, and these rounded up to whole vectors.
    keys: usize,
    columns: usize,
    /// Channels of a value, rounded up to whole vectors.
    width: usize,
    /// Pairs of channels: a column for each key.
    packed: Buffer<bf16>,
    /// Pairs of keys: a column for each channel of a value.
    zipped: Buffer<bf16>,
    /// A row for each query, and where it starts.
    logits: Buffer<T>,
    places: Vec<usize>,
    /// Rounded weights: a row for each query.
    rounded: Buffer<bf16>,
    /// Weighted values: a row for each query.
    products: Buffer<T>,
    room: Buffer<bf16>,
}

impl<T: Scalar> TmulKeys<T> {
    /// Buffers for blocks of this problem; `None` where products of tensors of `E` are not those of tiles.
    pub(super) fn new<E: Element<Compute = T>>(problem: &Problem<'_>, value_dim: usize) -> Option<Self> {
        E::as_bf16(&[])?;
        // Tokens are kept as 32 bits.
        u32::try_from(problem.key_len.max(problem.query_len)).ok()?;
        let (columns, width) = (problem.padded::<T>(problem.block_size), problem.padded::<T>(value_dim));
        let (depth, deep) = (problem.head_dim.next_multiple_of(TILE_DEPTH), columns.next_multiple_of(TILE_DEPTH));
        Some(Self {
            level: problem.level,
            pairs_level: Bf16Level::of(problem.level)?,
            unit: TmulUnit::of(problem.level)?,
            scale: f32::from_f64(problem.scale),
            softcap: problem.softcap.map(T::from_f64),
            keys: 0,
            columns: 0,
            width,
            packed: Buffer::scratch(depth * columns),
            zipped: Buffer::scratch(deep * width),
            logits: Buffer::scratch(QUERIES * columns),
            places: Vec::with_capacity(QUERIES),
            rounded: Buffer::scratch(QUERIES * deep),
            products: Buffer::scratch(QUERIES * width),
            room: Buffer::scratch(room_for_rows(depth.max(deep))),
        })
    }

    /// Packs the keys and values of these tokens.
    pub(super) fn pack(&mut self, keys: Matrix<'_, bf16>, values: Matrix<'_, bf16>, tokens: &[u32]) {
        let columns = tokens.len().next_multiple_of(T::lanes(self.level));
        (self.keys, self.columns) = (tokens.len(), columns);
        let pairs = keys.cols.next_multiple_of(TILE_DEPTH) / 2;
        let to = MatrixMut::new(&mut self.packed, pairs, 2 * columns, 2 * columns);
        self.unit.run(PackPairs { from: keys, rows: tokens, to });
        self.pack_values(values, tokens);
    }

    /// Packs values in place of those that are packed, as many.
    pub(super) fn pack_values(&mut self, from: Matrix<'_, bf16>, rows: &[u32]) {
        let pairs = self.columns.next_multiple_of(TILE_DEPTH) / 2;
        let to = MatrixMut::new(&mut self.zipped, pairs, 2 * self.width, 2 * self.width);
        self.pairs_level.run(ZipRows { from, rows, to });
    }

    /// The logits of these rows of `queries`, and where those of each start.
    pub(super) fn multiply(&mut self, queries: Matrix<'_, bf16>, listed: &[u32]) -> (&[T], &[usize]) {
        let (columns, count) = (self.columns, listed.len());
        let pairs = queries.cols.next_multiple_of(TILE_DEPTH) / 2;
        let logits = float32(&mut self.logits);
        self.unit.run(TmulGemm {
            a: queries,
            a_rows: Some(listed),
            b: Matrix::new(&self.packed, pairs, 2 * columns, 2 * columns),
            c: MatrixMut::new(logits, count, columns, columns),
            init: TmulInit::Scaled(self.scale),
            room: &mut self.room,
        });
        if let Some(cap) = self.softcap {
            T::run(self.level, Softcap { logits: &mut self.logits[..count * columns], cap, slopes: None });
        }
        self.places.clear();
        self.places.extend((0..count).map(|row| row * columns));
        (&self.logits, &self.places)
    }

    /// Multiplies the sums of these queries by a factor each, then adds the values with the weights of each.
    pub(super) fn add_values(&mut self, listed: &[u32], weights: &mut [T], rescale: &[T], state: &mut State<T>) {
        let (columns, width, count) = (self.columns, self.width, listed.len());
        let deep = columns.next_multiple_of(TILE_DEPTH);
        let weights = &*float32(weights);
        let from = Matrix::new(weights, count, columns, columns);
        self.unit.run(RoundLines { from, to: MatrixMut::new(&mut self.rounded, count, deep, deep) });
        let products = float32(&mut self.products);
        self.unit.run(TmulGemm {
            a: Matrix::new(&self.rounded, count, deep, deep),
            a_rows: None,
            b: Matrix::new(&self.zipped, deep / 2, 2 * width, 2 * width),
            c: MatrixMut::new(products, count, width, width),
            init: TmulInit::Scaled(1.0),
            room: &mut self.room,
        });
        let rows = state.maximum.len();
        T::run(
            self.level,
            AddRowsAt {
                from: Matrix::new(&self.products, count, width, width),
                numbers: listed,
                factors: Some(rescale),
                to: MatrixMut::new(&mut state.values, rows, width, width),
            },
        );
    }
}

#[cfg(test)]
mod tests;
