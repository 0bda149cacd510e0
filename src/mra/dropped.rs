//! The decisions of dropout for a tile of queries on a strip of keys.

use super::strip::{KeySource, Strip};
use crate::kernels::{Decisions, DropWeights, Dropout, DropoutRows, MatrixMut, Stream};
use crate::simd::{Element, Level, Scalar};

/// The queries of a tile and the keys of a strip, as dropout numbers them.
pub(crate) struct Dropped {
    dropout: Dropout,
    rows: DropoutRows,
    keys: Vec<u32>,
}

impl Dropped {
    pub(crate) fn new(dropout: Dropout) -> Self {
        Self { dropout, rows: DropoutRows::default(), keys: Vec::new() }
    }

    /// Starts a tile of `columns` lanes. Heads of all batch items are numbered through.
    pub(crate) fn start(&mut self, stream: Stream, head: usize, queries: impl Iterator<Item = usize>, columns: usize) {
        self.rows.start(columns, queries.map(|query| self.dropout.row(stream, head, query)));
    }

    /// Takes the keys from a strip.
    pub(crate) fn read_keys<E: Element<Compute = T>, T: Scalar>(&mut self, strip: &Strip<T>, source: &KeySource<'_, E>) {
        strip.read_tokens(source, &mut self.keys);
    }

    /// Takes keys, or blocks of them, that follow each other.
    pub(crate) fn set_keys(&mut self, first: usize, count: usize) {
        self.keys.clear();
        #[allow(clippy::cast_possible_truncation, reason = "the low 32 bits count")]
        self.keys.extend((first..first + count).map(|key| key as u32));
    }

    /// The decisions, for a kernel that has one row for each query.
    pub(crate) fn decisions(&self) -> Decisions<'_> {
        Decisions { keys: &self.keys, rows: &self.rows, dropout: self.dropout }
    }

    /// Drops weights, one row of `columns` for each key.
    pub(crate) fn drop_weights<T: Scalar>(&self, level: Level, weights: &mut [T], columns: usize) {
        let weights = MatrixMut::new(weights, self.keys.len(), columns, columns);
        T::run(level, DropWeights { weights, keys: &self.keys, rows: &self.rows, dropout: self.dropout });
    }
}
