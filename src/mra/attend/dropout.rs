//! The decisions of dropout for a tile of queries on a batch of keys.

use super::key_batch::{KeyBatch, KeySource};
use crate::kernels::{Decisions, DropWeights, Dropout, DropoutRows, MatrixMut, Stream};
use crate::simd::{Element, Level, Scalar};

/// The queries of a tile and the keys of a batch, as dropout numbers them: tokens count from the first one of the sequence.
pub(crate) struct DropoutTile {
    dropout: Dropout,
    rows: DropoutRows,
    keys: Vec<u32>,
}

impl DropoutTile {
    pub(crate) fn new(dropout: Dropout) -> Self {
        Self { dropout, rows: DropoutRows::default(), keys: Vec::new() }
    }

    /// Starts a tile of `columns` lanes. `head` is what [`Batch::dropout_head`](crate::mra::problem::Batch::dropout_head) says.
    pub(crate) fn start(&mut self, stream: Stream, head: usize, queries: impl Iterator<Item = usize>, columns: usize) {
        self.rows.start(columns, queries.map(|query| self.dropout.row(stream, head, query)));
    }

    /// Takes the keys of a batch.
    pub(crate) fn read_keys<E: Element<Compute = T>, T: Scalar>(&mut self, keys: &KeyBatch<T>, source: &KeySource<'_, E>) {
        keys.read_tokens(source, &mut self.keys);
        #[allow(clippy::cast_possible_truncation, reason = "the low 32 bits count")]
        let first = source.first_token() as u32;
        self.keys.iter_mut().for_each(|key| *key = key.wrapping_sub(first));
    }

    /// Takes these keys.
    pub(crate) fn take_keys(&mut self, keys: &[u32]) {
        self.keys.clear();
        self.keys.extend_from_slice(keys);
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
