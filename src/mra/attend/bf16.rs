//! The products of [`Attend`](super::Attend) for bfloat16 tensors, at levels that multiply bfloat16 as it is, and the logits of
//! [`GradientTile`](super::GradientTile): at logits of 1e6 those of backward must be rounded as those of forward are.
//!
//! Queries, keys and values enter the products as they are stored, the weights rounded to bfloat16, as in torch's attention; sums are in
//! float32. The softmax between the products stays in float32: its sum is that of the weights before they are rounded, so that
//! their errors average out instead of being divided out.
//!
//! Levels that have a [`TmulUnit`] multiply in whole tiles: what is packed then has zeros up to whole tiles.

use half::bf16;

use super::key_batch::{KeyBatch, KeySource};
use crate::exec::Buffer;
use crate::kernels::{
    AddValues, KeyDots, Matrix, MatrixMut, PackPairs, RoundColumns, RoundRows, TmulGemm, TmulInit, ZipRows, pack_channel_pairs,
    room_for_rows,
};
use crate::mra::problem::Problem;
use crate::simd::{Bf16Level, Element, Scalar, TILE_DEPTH, TmulUnit};

/// The logits of bfloat16 queries and keys.
pub(crate) struct Bf16Logits {
    level: Bf16Level,
    pub(super) tmul: Option<TmulUnit>,
    scale: f32,
    columns: usize,
    /// Pairs of channels, a column for each query of the tile.
    queries: Buffer<bf16>,
    /// Rows of pairs in it.
    pairs: usize,
    /// Rows of keys that are not whole tiles.
    room: Buffer<bf16>,
    /// Rows of a tile of queries, one after the other, for tiles, and their numbers.
    rows: Buffer<bf16>,
    numbers: Vec<u32>,
    /// The tokens of the batch of keys.
    pub(super) tokens: Vec<u32>,
}

impl Bf16Logits {
    /// Buffers for tiles of at most `columns` queries; `None` if tensors of `E` are widened to float32 before they are multiplied.
    pub(crate) fn new<E: Element>(problem: &Problem<'_>, columns: usize) -> Option<Self> {
        E::as_bf16(&[])?;
        // Tokens are kept as 32 bits.
        u32::try_from(problem.key_len).ok()?;
        let level = Bf16Level::of(problem.level)?;
        let tmul = TmulUnit::of(problem.level);
        let pairs = pairs(problem.head_dim, tmul.is_some());
        Some(Self {
            level,
            scale: f32::from_f64(problem.scale),
            columns: 0,
            queries: Buffer::scratch(pairs * 2 * columns),
            pairs,
            room: Buffer::scratch(if tmul.is_some() { room_for_rows(problem.head_dim) } else { 0 }),
            rows: Buffer::scratch(if tmul.is_some() { problem.head_dim * columns } else { 0 }),
            numbers: (0..u32::try_from(columns).ok()?).collect(),
            tmul,
            tokens: Vec::new(),
        })
    }

    /// Starts a tile of these queries, with this many lanes.
    pub(crate) fn start<'a, E: Element>(&mut self, queries: impl ExactSizeIterator<Item = &'a [E]>, columns: usize) {
        self.columns = columns;
        let mut to = MatrixMut::new(&mut self.queries, self.pairs, 2 * columns, 2 * columns);
        let queries = queries.map(|row| E::as_bf16(row).expect("bfloat16"));
        let Some(tmul) = &self.tmul else { return pack_channel_pairs(queries, &mut to) };
        let from = copy_rows(queries, &mut self.rows);
        tmul.run(PackPairs { from, rows: &self.numbers[..from.rows], to });
    }

    /// The logits of a batch of keys, one row for each of them.
    pub(crate) fn compute<T: Scalar, E: Element<Compute = T>>(
        &mut self,
        batch: &KeyBatch<T>,
        source: &KeySource<'_, E>,
        logits: &mut [f32],
    ) {
        batch.read_tokens(source, &mut self.tokens);
        let (keys, _) = source.all_bf16().expect("bfloat16");
        self.multiply(keys, logits);
    }

    /// The logits of the rows of `keys` that the tokens name, one row for each of them.
    fn multiply(&mut self, keys: Matrix<'_, bf16>, logits: &mut [f32]) {
        let columns = self.columns;
        let queries = Matrix::new(&self.queries, self.pairs, 2 * columns, 2 * columns);
        let logits = MatrixMut::new(logits, self.tokens.len(), columns, columns);
        let Some(tmul) = &self.tmul else {
            return self.level.run(KeyDots { keys, rows: &self.tokens, queries, scale: self.scale, logits });
        };
        let (init, room) = (TmulInit::Scaled(self.scale), &mut self.room[..]);
        tmul.run(TmulGemm { a: keys, a_rows: Some(&self.tokens), b: queries, c: logits, init, room });
    }

    /// As [`Self::compute`], of these rows of `keys`.
    pub(crate) fn of_tokens(&mut self, keys: Matrix<'_, bf16>, tokens: &[u32], logits: &mut [f32]) {
        self.tokens.clear();
        self.tokens.extend_from_slice(tokens);
        self.multiply(keys, logits);
    }

    /// Whether all products are those of tiles.
    pub(crate) fn on_tiles(&self) -> bool {
        self.tmul.is_some()
    }

    /// Writes rows, in their order, in pairs: a column for each channel, of which there are `width` with those that are 0.
    pub(super) fn zip_all(&self, from: Matrix<'_, bf16>, width: usize, to: &mut [bf16]) {
        self.zip(from, &self.numbers[..from.rows], width, to);
    }

    /// Writes rows, in their order, as columns of pairs of channels, which are whole tiles.
    pub(super) fn pack_all(&self, from: Matrix<'_, bf16>, columns: usize, to: &mut [bf16]) {
        let to = MatrixMut::new(to, pairs(from.cols, true), 2 * columns, 2 * columns);
        let tmul = self.tmul.as_ref().expect("a level with tiles");
        tmul.run(PackPairs { from, rows: &self.numbers[..from.rows], to });
    }

    /// Writes some rows in pairs: a column for each channel, of which there are `width` with those that are 0.
    pub(super) fn zip<'b>(&self, from: Matrix<'_, bf16>, rows: &[u32], width: usize, to: &'b mut [bf16]) -> Matrix<'b, bf16> {
        let pairs = pairs(rows.len(), self.tmul.is_some());
        self.level.run(ZipRows { from, rows, to: MatrixMut::new(to, pairs, 2 * width, 2 * width) });
        Matrix::new(to, pairs, 2 * width, 2 * width)
    }
}

/// Copies rows, one after the other.
pub(super) fn copy_rows<'a, 'b>(rows: impl ExactSizeIterator<Item = &'a [bf16]>, to: &'b mut [bf16]) -> Matrix<'b, bf16> {
    let (count, mut channels) = (rows.len(), 0);
    for (index, row) in rows.enumerate() {
        channels = row.len();
        to[index * channels..][..channels].copy_from_slice(row);
    }
    Matrix::new(to, count, channels, channels)
}

/// Pairs of so many numbers, with those that tiles have beside them.
pub(super) fn pairs(numbers: usize, tiles: bool) -> usize {
    if tiles { numbers.next_multiple_of(TILE_DEPTH) / 2 } else { numbers.div_ceil(2) }
}

/// The buffers of the products of forward, all of them pairs of numbers.
pub(crate) struct Bf16Products {
    pub(crate) logits: Bf16Logits,
    /// Pairs of keys: a column for each query of the tile, or a row, for tiles.
    weights: Buffer<bf16>,
    /// Pairs of keys, a column for each channel of a value.
    values: Buffer<bf16>,
    /// Rows of weights that are not whole tiles.
    room: Buffer<bf16>,
}

impl Bf16Products {
    /// Buffers for tiles of at most `columns` queries; `None` if tensors of `E` are widened to float32 before they are multiplied.
    pub(crate) fn new<E: Element>(problem: &Problem<'_>, columns: usize, value_dim: usize) -> Option<Self> {
        let logits = Bf16Logits::new::<E>(problem, columns)?;
        let (keys, tiles) = (KeyBatch::<f32>::capacity(problem), logits.tmul.is_some());
        let pairs_of_keys = pairs(keys, tiles);
        Some(Self {
            logits,
            weights: Buffer::scratch(pairs_of_keys * 2 * columns),
            values: Buffer::scratch(pairs_of_keys * 2 * problem.padded::<f32>(value_dim)),
            room: Buffer::scratch(if tiles { room_for_rows(keys) } else { 0 }),
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
        let Bf16Logits { level, columns, ref tokens, ref tmul, .. } = self.logits;
        let (_, values) = source.all_bf16().expect("bfloat16");
        let values = self.logits.zip(values, tokens, sums.cols, &mut self.values);
        let (from, pairs) = (Matrix::new(weights, tokens.len(), columns, columns), values.rows);
        let Some(tmul) = tmul else {
            let to = MatrixMut::new(&mut self.weights, pairs, 2 * columns, 2 * columns);
            level.run(RoundRows { from, to });
            let weights = Matrix::new(&self.weights, pairs, 2 * columns, 2 * columns);
            return level.run(AddValues { weights, values, rescale, sums });
        };
        tmul.run(RoundColumns { from, to: MatrixMut::new(&mut self.weights, columns, 2 * pairs, 2 * pairs) });
        let (init, room) = (TmulInit::ScaleRows(rescale), &mut self.room[..]);
        let a = Matrix::new(&self.weights, sums.rows, 2 * pairs, 2 * pairs);
        tmul.run(TmulGemm { a, a_rows: None, b: values, c: sums, init, room });
    }
}
