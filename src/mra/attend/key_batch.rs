//! Batches of keys: what one step of the softmax runs over.
//!
//! The keys of several selected blocks are taken together, so that the state of the softmax is touched once per batch and
//! not once per block. Keys and values are read where they lie if they are consecutive tokens of the compute type with whole
//! vectors of channels; otherwise they are copied first, which also drops padded tokens. Products of bfloat16 take them
//! from the tensors by their tokens, and then the batch only says which ones they are.

use std::ops::Range;

use half::bf16;

use crate::exec::Buffer;
use crate::kernels::{Matrix, MatrixMut, pack_rows};
use crate::mra::problem::{Blocks, Problem};
use crate::simd::{Element, Scalar};
use crate::tensor::Rows;

/// Keys of a batch, at most: as many as the largest block has.
const BATCH_KEYS: usize = Problem::MAX_BLOCK;

/// Bytes of keys and values of a head that a second-level cache may hold beside everything else.
const NEAR: usize = 512 << 10;

/// The keys and values of one head.
#[derive(Clone, Copy)]
pub(crate) struct KeySource<'a, E: Element> {
    keys: Rows<'a, E>,
    values: Rows<'a, E>,
    blocks: &'a Blocks,
    in_place: bool,
    staged: bool,
    far: bool,
    /// What dropout calls the first token.
    first_place: usize,
}

impl<'a, E: Element> KeySource<'a, E> {
    pub(crate) fn new(problem: &Problem<'_>, keys: Rows<'a, E>, values: Rows<'a, E>, blocks: &'a Blocks) -> Self {
        let whole = |channels| problem.padded::<E::Compute>(channels) == channels;
        let in_place = E::as_compute(&[]).is_some() && whole(keys.cols()) && whole(values.cols());
        let bytes = blocks.total() * (keys.cols() + values.cols()) * size_of::<E>();
        Self { keys, values, blocks, in_place, staged: true, far: bytes > NEAR, first_place: 0 }
    }

    /// The same keys and values, for products that take them from the tensors themselves.
    pub(crate) fn unstaged(self) -> Self {
        Self { staged: false, ..self }
    }

    /// The same keys and values, of which dropout calls the first one `place`.
    pub(crate) fn placed_at(self, place: usize) -> Self {
        Self { first_place: place, ..self }
    }

    /// All keys and values by token, if they are bfloat16.
    pub(crate) fn all_bf16(&self) -> Option<(Matrix<'a, bf16>, Matrix<'a, bf16>)> {
        fn matrix<'a, E: Element>(rows: &Rows<'a, E>) -> Option<Matrix<'a, bf16>> {
            let (data, stride) = rows.tail(0);
            Some(Matrix::new(E::as_bf16(data)?, rows.len(), rows.cols(), stride))
        }
        matrix(&self.keys).zip(matrix(&self.values))
    }

    /// What to prefetch on the way: nothing if everything is near, where it would only cost time (3 % at 512 tokens).
    pub(crate) fn ahead<'m, T>(&self, rows: Matrix<'m, T>) -> Option<Matrix<'m, T>> {
        self.far.then_some(rows)
    }

    /// As [`Self::ahead`], the keys and values of a block.
    pub(crate) fn block_ahead(&self, block: usize) -> Option<[Matrix<'a, E::Compute>; 2]> {
        let numbers = self.numbers(block);
        if !self.far || numbers.is_empty() || !self.reads_in_place(numbers.clone()) {
            return None;
        }
        let token = self.blocks.token(numbers.start);
        Some([&self.keys, &self.values].map(|rows| in_place(rows, token, numbers.len())))
    }

    /// Which token has this number.
    pub(crate) fn token(&self, number: usize) -> usize {
        self.blocks.token(number)
    }

    /// The token at place 0.
    pub(crate) fn first_token(&self) -> usize {
        self.blocks.tokens().start.wrapping_sub(self.first_place)
    }

    /// As [`Self::ahead`], the keys of the first of these blocks and of those that follow it without a gap, if they are read where
    /// they lie.
    pub(crate) fn keys_ahead(&self, blocks: &[u32]) -> Option<Matrix<'a, E::Compute>> {
        let (&first, rest) = blocks.split_first()?;
        let following = rest.iter().zip(first + 1..).take_while(|&(&block, next)| block == next).count();
        let numbers = self.numbers(first as usize).start..self.numbers(first as usize + following).end;
        if numbers.is_empty() || !self.reads_in_place(numbers.clone()) {
            return None;
        }
        self.ahead(in_place(&self.keys, self.blocks.token(numbers.start), numbers.len()))
    }

    /// Whether the keys with these numbers are read where they lie.
    fn reads_in_place(&self, numbers: Range<usize>) -> bool {
        self.in_place && self.blocks.consecutive(numbers)
    }

    /// The numbers of the keys of a block.
    pub(crate) fn numbers(&self, block: usize) -> Range<usize> {
        self.blocks.numbers(block)
    }
}

/// Consecutive rows of a batch that lie together.
#[derive(Clone)]
struct Part {
    /// Rows of the batch.
    rows: Range<usize>,
    /// Number of the first key.
    first: usize,
    in_place: bool,
}

/// The keys of one step.
pub(crate) struct KeyBatch<T> {
    parts: Vec<Part>,
    rows: usize,
    capacity: usize,
    keys: Buffer<T>,
    values: Buffer<T>,
    key_width: usize,
    value_width: usize,
}

/// The keys and values of a part, and which keys they are.
pub(crate) struct PartView<'a, T> {
    pub(crate) keys: Matrix<'a, T>,
    pub(crate) values: Matrix<'a, T>,
    /// Rows of the batch.
    pub(crate) rows: Range<usize>,
    /// Number of the first key.
    pub(crate) first: usize,
}

impl<T: Scalar> KeyBatch<T> {
    pub(crate) fn new(problem: &Problem<'_>, head_dim: usize, value_dim: usize) -> Self {
        let capacity = Self::capacity(problem);
        let (key_width, value_width) = (problem.padded::<T>(head_dim), problem.padded::<T>(value_dim));
        Self {
            parts: Vec::new(),
            rows: 0,
            capacity,
            keys: Buffer::scratch(0),
            values: Buffer::scratch(0),
            key_width,
            value_width,
        }
    }

    /// The most keys of a batch.
    pub(crate) fn capacity(problem: &Problem<'_>) -> usize {
        BATCH_KEYS.min(problem.key_len).max(1)
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Rows that lie together, and the number of the first key of each.
    pub(crate) fn spans(&self) -> impl Iterator<Item = (Range<usize>, usize)> {
        self.parts.iter().map(|part| (part.rows.clone(), part.first))
    }

    /// Lists the tokens of the keys, as the low 32 bits of their numbers.
    pub(crate) fn read_tokens<E: Element<Compute = T>>(&self, source: &KeySource<'_, E>, tokens: &mut Vec<u32>) {
        tokens.clear();
        for (rows, first) in self.spans() {
            #[allow(clippy::cast_possible_truncation, reason = "the low 32 bits count")]
            tokens.extend((first..first + rows.len()).map(|number| source.token(number) as u32));
        }
    }

    pub(crate) fn clear(&mut self) {
        self.parts.clear();
        self.rows = 0;
    }

    /// Adds keys, unless there is no room for all of them.
    pub(crate) fn push<E: Element<Compute = T>>(&mut self, source: &KeySource<'_, E>, numbers: Range<usize>) -> bool {
        let rows = self.rows..self.rows + numbers.len();
        if rows.end > self.capacity {
            return false;
        }
        if numbers.is_empty() {
            return true;
        }
        self.rows = rows.end;
        let in_place = source.reads_in_place(numbers.clone());
        if in_place {
            if let Some(last) = self.parts.last_mut()
                && last.in_place
                && source.blocks.consecutive(last.first..numbers.end)
                && last.first + last.rows.len() == numbers.start
            {
                last.rows.end = rows.end;
                return true;
            }
        } else if source.staged {
            if self.keys.is_empty() && self.values.is_empty() {
                // Most batches read all keys where they lie: a small call would take longer to clear these than to use them.
                self.keys = Buffer::scratch(self.capacity * self.key_width);
                self.values = Buffer::scratch(self.capacity * self.value_width);
            }
            let tokens = || numbers.clone().map(|number| source.blocks.token(number));
            pack_rows(tokens().map(|token| source.keys.row(token)), &mut staged(&mut self.keys, &rows, self.key_width));
            pack_rows(tokens().map(|token| source.values.row(token)), &mut staged(&mut self.values, &rows, self.value_width));
        }
        self.parts.push(Part { rows, first: numbers.start, in_place });
        true
    }

    /// The parts, in order of the keys.
    pub(crate) fn parts<'a, E: Element<Compute = T>>(
        &'a self,
        source: &'a KeySource<'_, E>,
    ) -> impl Iterator<Item = PartView<'a, T>> {
        assert!(source.staged, "keys and values in the compute type");
        self.parts.iter().map(move |part| {
            let count = part.rows.len();
            let (keys, values) = if part.in_place {
                let token = source.blocks.token(part.first);
                (in_place(&source.keys, token, count), in_place(&source.values, token, count))
            } else {
                let of = |buffer: &'a Buffer<T>, width| Matrix::new(&buffer[part.rows.start * width..], count, width, width);
                (of(&self.keys, self.key_width), of(&self.values, self.value_width))
            };
            PartView { keys, values, rows: part.rows.clone(), first: part.first }
        })
    }
}

fn staged<'a, T>(buffer: &'a mut Buffer<T>, rows: &Range<usize>, width: usize) -> MatrixMut<'a, T> {
    MatrixMut::new(&mut buffer[rows.start * width..rows.end * width], rows.len(), width, width)
}

fn in_place<'a, E: Element>(rows: &Rows<'a, E>, token: usize, count: usize) -> Matrix<'a, E::Compute> {
    let (data, stride) = rows.tail(token);
    Matrix::new(E::as_compute(data).expect("the compute type"), count, rows.cols(), stride)
}
