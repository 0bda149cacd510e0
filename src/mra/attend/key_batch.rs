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
use crate::simd::{Element, Level, Scalar};
use crate::tensor::Rows;

/// Keys of a batch, at most: as many as the largest block has.
const BATCH_KEYS: usize = Problem::MAX_BLOCK;

/// Bytes of keys and values of a head that a second-level cache may hold beside everything else.
const NEAR: usize = 512 << 10;

/// Bytes of copied keys and values of a head that a thread keeps, at most.
const KEPT: usize = 8 << 20;

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

    /// Tells the keys and values of this head from those of others, and their numbers from those of other sequences.
    fn identity(&self) -> [usize; 3] {
        let address = |rows: &Rows<'a, E>| rows.tail(0).0.as_ptr().addr();
        [address(&self.keys), address(&self.values), std::ptr::from_ref(self.blocks).addr()]
    }

    /// Copies keys and values, as the compute type and with whole vectors of channels.
    fn copy(
        &self,
        level: Level,
        numbers: Range<usize>,
        mut keys: MatrixMut<'_, E::Compute>,
        mut values: MatrixMut<'_, E::Compute>,
    ) {
        let tokens = || numbers.clone().map(|number| self.blocks.token(number));
        pack_rows(level, tokens().map(|token| self.keys.row(token)), &mut keys);
        pack_rows(level, tokens().map(|token| self.values.row(token)), &mut values);
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
    place: Place,
}

/// Where keys and values are read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In the tensors.
    Tensors,
    /// In copies of this batch.
    Batch,
    /// In copies that outlive it.
    Kept,
}

/// Copies of keys and values of one head, by number, made when they are first needed: several blocks of queries select a block.
struct Kept<T> {
    most_keys: usize,
    head: [usize; 3],
    /// At the number of the first key of a range that is there, the number behind its last one.
    ends: Vec<usize>,
    keys: Buffer<T>,
    values: Buffer<T>,
}

/// The keys of one step.
pub(crate) struct KeyBatch<T> {
    level: Level,
    parts: Vec<Part>,
    rows: usize,
    capacity: usize,
    keys: Buffer<T>,
    values: Buffer<T>,
    key_width: usize,
    value_width: usize,
    kept: Option<Kept<T>>,
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
            level: problem.level,
            parts: Vec::new(),
            rows: 0,
            capacity,
            keys: Buffer::scratch(0),
            values: Buffer::scratch(0),
            key_width,
            value_width,
            kept: None,
        }
    }

    /// Keeps copies for the batches that follow, of heads of at most so many keys, where that is worth the memory.
    pub(crate) fn keeping(self, problem: &Problem<'_>, most_keys: usize) -> Self {
        let bytes = most_keys * (self.key_width + self.value_width) * size_of::<T>();
        let kept = Kept { most_keys, head: [0; 3], ends: Vec::new(), keys: Buffer::scratch(0), values: Buffer::scratch(0) };
        Self { kept: (bytes <= KEPT && problem.query_len > problem.block_size).then_some(kept), ..self }
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
        // Copies are not taken together, whether they are kept or not: sums over two parts have other bits than those over one.
        let place = if source.reads_in_place(numbers.clone()) {
            Place::Tensors
        } else if self.keep(source, &numbers) {
            Place::Kept
        } else {
            self.stage(source, &numbers, &rows);
            Place::Batch
        };
        if place == Place::Tensors
            && let Some(last) = self.parts.last_mut()
            && last.place == place
            && source.blocks.consecutive(last.first..numbers.end)
            && last.first + last.rows.len() == numbers.start
        {
            last.rows.end = rows.end;
            return true;
        }
        self.parts.push(Part { rows, first: numbers.start, place });
        true
    }

    /// Copies keys, unless they are there, to be kept; or says that copies are not kept.
    fn keep<E: Element<Compute = T>>(&mut self, source: &KeySource<'_, E>, numbers: &Range<usize>) -> bool {
        let Some(kept) = self.kept.as_mut().filter(|_| source.staged) else { return false };
        if kept.ends.is_empty() {
            kept.ends = vec![0; kept.most_keys];
            kept.keys = Buffer::scratch(kept.most_keys * self.key_width);
            kept.values = Buffer::scratch(kept.most_keys * self.value_width);
        }
        if kept.head != source.identity() {
            kept.head = source.identity();
            kept.ends.fill(0);
        }
        if kept.ends[numbers.start] < numbers.end {
            let (keys, values) =
                (rows_of(&mut kept.keys, numbers, self.key_width), rows_of(&mut kept.values, numbers, self.value_width));
            source.copy(self.level, numbers.clone(), keys, values);
            kept.ends[numbers.start] = numbers.end;
        }
        true
    }

    /// Copies keys to these rows of the batch, if they are wanted.
    fn stage<E: Element<Compute = T>>(&mut self, source: &KeySource<'_, E>, numbers: &Range<usize>, rows: &Range<usize>) {
        if !source.staged {
            return;
        }
        if self.keys.is_empty() && self.values.is_empty() {
            // Most batches read all keys where they lie: a small call would take longer to clear these than to use them.
            self.keys = Buffer::scratch(self.capacity * self.key_width);
            self.values = Buffer::scratch(self.capacity * self.value_width);
        }
        let (keys, values) = (rows_of(&mut self.keys, rows, self.key_width), rows_of(&mut self.values, rows, self.value_width));
        source.copy(self.level, numbers.clone(), keys, values);
    }

    /// The parts, in order of the keys.
    pub(crate) fn parts<'a, E: Element<Compute = T>>(
        &'a self,
        source: &'a KeySource<'_, E>,
    ) -> impl Iterator<Item = PartView<'a, T>> {
        assert!(source.staged, "keys and values in the compute type");
        self.parts.iter().map(move |part| {
            let count = part.rows.len();
            let copies = |keys: &'a Buffer<T>, values: &'a Buffer<T>, row: usize| {
                let of = |buffer: &'a Buffer<T>, width| Matrix::new(&buffer[row * width..], count, width, width);
                (of(keys, self.key_width), of(values, self.value_width))
            };
            let (keys, values) = match (part.place, &self.kept) {
                (Place::Kept, Some(kept)) => copies(&kept.keys, &kept.values, part.first),
                (Place::Tensors, _) => {
                    let token = source.blocks.token(part.first);
                    (in_place(&source.keys, token, count), in_place(&source.values, token, count))
                }
                _ => copies(&self.keys, &self.values, part.rows.start),
            };
            PartView { keys, values, rows: part.rows.clone(), first: part.first }
        })
    }
}

fn rows_of<'a, T>(buffer: &'a mut Buffer<T>, rows: &Range<usize>, width: usize) -> MatrixMut<'a, T> {
    MatrixMut::new(&mut buffer[rows.start * width..rows.end * width], rows.len(), width, width)
}

fn in_place<'a, E: Element>(rows: &Rows<'a, E>, token: usize, count: usize) -> Matrix<'a, E::Compute> {
    let (data, stride) = rows.tail(token);
    Matrix::new(E::as_compute(data).expect("the compute type"), count, rows.cols(), stride)
}
