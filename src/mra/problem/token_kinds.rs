//! What a mask or bias leaves to each token of each block of keys: dead, cut or open (docs/definitions.md, section 4).

use std::ops::Range;

use super::blocks::Blocks;
use super::mask::{Bias, BiasData};
use super::padding::{SCAN_THREAD, any_and_all_set};
use super::sight::{Kind, Sight};
use crate::exec::{Chunks, threads};

/// A bias whose range within a block is larger than this is not averaged: such numbers (`-1e4`, `-1e9`, the lowest finite one)
/// are in use as masks, and next to a pair without them the weight of one with them is 0.
pub(crate) const WIDEST: f64 = 1e3;

/// The kinds of all blocks of all tokens of a batch item, and mean biases where they are open.
#[derive(Debug)]
pub(crate) struct TokenKinds {
    kinds: Vec<Kind>,
    /// For each token the first block that is not dead, and the one behind the last.
    alive: Vec<[u32; 2]>,
    /// The mean bias of the token on the keys of an open block; empty for a mask.
    means: Vec<f64>,
    columns: usize,
    tokens: usize,
    same_heads: bool,
}

/// Tokens of a task: neighbours often see the same.
const TOKENS: usize = 64;

impl TokenKinds {
    /// Reads the mask of a batch item for `tokens` queries, and with `is_biased` its mean biases. `sight` says what the window leaves to
    /// each of them.
    pub(crate) fn new<'s>(
        bias: Option<&Bias<'_>>,
        is_biased: bool,
        item: usize,
        tokens: Range<usize>,
        keys: &Blocks,
        threads: usize,
        sight: impl Fn(usize) -> Sight<'s> + Sync,
    ) -> Self {
        let (columns, heads) = (keys.len(), bias.map_or(1, Bias::distinct_heads));
        let rows = heads * tokens.len();
        let mut kinds = vec![Kind::Dead; rows * columns];
        let mut alive = vec![[0; 2]; rows];
        let mut means = vec![0.0; if is_biased { kinds.len() } else { 0 }];
        let parts = tokens.len().div_ceil(TOKENS);
        {
            let (to_kinds, to_alive) = (Chunks::new(&mut kinds, columns), Chunks::new(&mut alive, 1));
            let to_means = Chunks::new(&mut means, if is_biased { columns } else { 0 });
            let worth = rows * keys.total() / SCAN_THREAD + 1;
            threads::for_each(threads.min(worth), heads * parts, Line::default, |line, task| {
                let (head, first) = (task / parts, task % parts * TOKENS);
                let mut before: Option<(usize, Range<usize>)> = None;
                for token in first..(first + TOKENS).min(tokens.len()) {
                    let (row, query) = (head * tokens.len() + token, tokens.start + token);
                    // SAFETY: each task has its own rows.
                    let (kinds, alive) = unsafe { (to_kinds.get_mut(row), &mut to_alive.get_mut(row)[0]) };
                    let sight = sight(query);
                    let same = |(row, keys): &(usize, Range<usize>)| {
                        *keys == sight.keys
                            && bias.is_some_and(|bias| bias.is_same_row([item, head, query], query - 1))
                            && *row + 1 == query
                    };
                    if before.as_ref().is_some_and(same) {
                        // SAFETY: as above; the row before is not written to any more.
                        kinds.copy_from_slice(unsafe { to_kinds.get_mut(row - 1) });
                    } else {
                        match bias {
                            None => sight.live.clone().for_each(|j| {
                                kinds[j] = if keys.count(j) == 0 { Kind::Dead } else { sight.kind(j) };
                            }),
                            Some(bias) if is_biased => {
                                // SAFETY: as above.
                                let means = unsafe { to_means.get_mut(row) };
                                read_bias(bias, [item, head, query], keys, &sight, line, kinds, means);
                            }
                            Some(bias) => read_mask(bias, [item, head, query], keys, &sight, line, kinds),
                        }
                    }
                    *alive = span(kinds);
                    before = Some((query, sight.keys));
                }
            });
        }
        Self { kinds, alive, means, columns, tokens: tokens.len(), same_heads: heads <= 1 }
    }

    fn row(&self, head: usize, token: usize) -> usize {
        if self.same_heads { token } else { head * self.tokens + token }
    }

    /// The kinds of the blocks of a token, which is counted from the first one, and the range outside of which all are dead.
    pub(crate) fn of(&self, head: usize, token: usize) -> (&[Kind], Range<usize>) {
        let row = self.row(head, token);
        let [start, end] = self.alive[row].map(|block| block as usize);
        (&self.kinds[row * self.columns..(row + 1) * self.columns], start..end)
    }

    /// The mean biases of the blocks of a token; `None` for a mask.
    pub(crate) fn means_of(&self, head: usize, token: usize) -> Option<&[f64]> {
        let row = self.row(head, token);
        self.is_biased().then(|| &self.means[row * self.columns..(row + 1) * self.columns])
    }

    /// Whether biases are added to logits.
    pub(crate) fn is_biased(&self) -> bool {
        !self.means.is_empty()
    }
}

/// The first block that is not dead, and the one behind the last.
fn span(kinds: &[Kind]) -> [u32; 2] {
    let is_alive = |&kind: &Kind| kind != Kind::Dead;
    let end = kinds.iter().rposition(is_alive).map_or(0, |last| last + 1);
    let start = kinds[..end].iter().position(is_alive).unwrap_or(0);
    [start, end].map(|block| u32::try_from(block).expect("fewer than 2^32 blocks"))
}

/// A row of a mask or bias.
#[derive(Default)]
struct Line {
    bytes: Vec<u8>,
    numbers: Vec<f64>,
}

fn read_mask(bias: &Bias<'_>, place: [usize; 3], keys: &Blocks, sight: &Sight<'_>, line: &mut Line, kinds: &mut [Kind]) {
    if matches!(bias.data, BiasData::Tiles { .. }) {
        for j in sight.live.clone() {
            let numbers = within(keys.numbers(j), &sight.keys);
            kinds[j] = if numbers.is_empty() {
                Kind::Dead
            } else if let Some(visible) = bias.whole_block(place, keys, numbers.clone()) {
                if visible { of_window(sight, j) } else { Kind::Dead }
            } else {
                kind_of_bytes(bias.visible(place, keys, numbers, &mut line.bytes), sight, j)
            };
        }
        return;
    }
    let row = bias.visible(place, keys, sight.keys.clone(), &mut line.bytes);
    for j in sight.live.clone() {
        let numbers = within(keys.numbers(j), &sight.keys);
        let part = &row[numbers.start - sight.keys.start..numbers.end - sight.keys.start];
        kinds[j] = kind_of_bytes(part, sight, j);
    }
}

/// The kind of a block of which the window leaves keys with these bytes of a mask.
fn kind_of_bytes(part: &[u8], sight: &Sight<'_>, block: usize) -> Kind {
    match any_and_all_set(part) {
        (false, _) => Kind::Dead,
        (true, true) => of_window(sight, block),
        (true, false) => Kind::Cut,
    }
}

/// The kind of a block that the window alone decides on.
fn of_window(sight: &Sight<'_>, block: usize) -> Kind {
    if sight.open.contains(&block) { Kind::Open } else { Kind::Cut }
}

fn within(numbers: Range<usize>, limits: &Range<usize>) -> Range<usize> {
    let start = numbers.start.max(limits.start);
    start..numbers.end.min(limits.end).max(start)
}

fn read_bias(
    bias: &Bias<'_>,
    place: [usize; 3],
    keys: &Blocks,
    sight: &Sight<'_>,
    line: &mut Line,
    kinds: &mut [Kind],
    means: &mut [f64],
) {
    line.numbers.clear();
    line.numbers.resize(sight.keys.len(), 0.0);
    bias.read(place, keys, sight.keys.clone(), &mut line.numbers);
    for j in sight.live.clone() {
        let numbers = within(keys.numbers(j), &sight.keys);
        let part = &line.numbers[numbers.start - sight.keys.start..numbers.end - sight.keys.start];
        let Bounds { lowest, highest, sum } = bounds(part);
        kinds[j] = match kind_of_bounds(lowest, highest, sum, part.len()) {
            Kind::Open => of_window(sight, j),
            kind => kind,
        };
        means[j] = (sum / part.len().max(1) as f64).max(lowest);
    }
}

/// The range, NaN left out, and the sum of some biases.
struct Bounds {
    lowest: f64,
    highest: f64,
    sum: f64,
}

fn bounds(numbers: &[f64]) -> Bounds {
    const LANES: usize = 8;
    let (mut low, mut high, mut sums) = ([f64::INFINITY; LANES], [f64::NEG_INFINITY; LANES], [0.0; LANES]);
    for chunk in numbers.chunks(LANES) {
        for (lane, &x) in chunk.iter().enumerate() {
            low[lane] = if x < low[lane] { x } else { low[lane] };
            high[lane] = if x > high[lane] { x } else { high[lane] };
            sums[lane] += x;
        }
    }
    Bounds {
        lowest: low.into_iter().fold(f64::INFINITY, f64::min),
        highest: high.into_iter().fold(f64::NEG_INFINITY, f64::max),
        sum: sums.into_iter().sum(),
    }
}

/// What a block is whose biases have these bounds (NaN left out), this sum and this number.
pub(super) fn kind_of_bounds(lowest: f64, highest: f64, sum: f64, count: usize) -> Kind {
    if count == 0 || (highest == f64::NEG_INFINITY && !sum.is_nan()) {
        Kind::Dead
    } else if sum.is_nan() || lowest.is_infinite() || highest.is_infinite() || highest - lowest > WIDEST {
        Kind::Cut
    } else {
        Kind::Open
    }
}
