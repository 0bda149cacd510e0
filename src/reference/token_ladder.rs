//! The token form with several levels of blocks (section 5 of the definitions): every token walks down by itself.

use ndarray::{Array2, Array3, Array4, ArrayView2, Axis, s};

use super::head::{Head, add, dot, pool, spread};
use super::ladder::Refined;
use super::score::rank;
use super::segment::{Kind, Segment};
use super::select::rounded;
use super::{Attention, Gradients, Saved};
use crate::{Budget, Mode};

/// Attention in the token form whose finest blocks are those of `attention`, with larger ones above.
#[derive(Debug, Clone)]
pub struct TokenLadder<'a> {
    /// The inputs, and the finest blocks.
    pub attention: Attention<'a>,
    /// Tokens per block of each level above, the coarsest first; each is a multiple of the next one.
    pub coarser: Vec<usize>,
}

impl<'a> TokenLadder<'a> {
    /// The same with the blocks of each level, the coarsest first.
    fn levels(&self) -> Vec<Attention<'a>> {
        let sizes = self.coarser.iter().copied().chain([self.attention.block_size]);
        sizes.map(|block_size| Attention { block_size, pool_queries: false, ..self.attention }).collect()
    }

    /// Calls `body` with the heads of all levels, for each batch item and each head of it.
    fn for_heads(&self, mut body: impl FnMut(usize, usize, &[Head<'_>])) {
        let levels = self.levels();
        let segments: Vec<Vec<Segment>> = levels.iter().map(Attention::segments).collect();
        let (batch, heads, ..) = self.attention.query.dim();
        for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            let of_levels = levels.iter().zip(&segments);
            let heads: Vec<Head<'_>> = of_levels.map(|(level, segments)| level.head(&segments[b], b, h)).collect();
            body(b, h, &heads);
        }
    }

    /// A selection of whatever `chosen` says for (level, batch item, head, row, block): those in blocks that are refined above, and
    /// with them those that are cut.
    pub fn refined(&self, chosen: impl Fn(usize, usize, usize, usize, usize) -> bool) -> Refined {
        let mut refined: Refined = self.levels().iter().map(|level| level.selection(|_, _, _, _| false)).collect();
        self.for_heads(|b, h, heads| {
            for (level, head) in heads.iter().enumerate() {
                let candidates = self.candidates(heads, level, |level, at| refined[level][b][[h, at.0, at.1]]);
                let kinds = head.kinds();
                refined[level][b].slice_mut(s![h, .., ..]).assign(&Array2::from_shape_fn(kinds.raw_dim(), |at| {
                    candidates[at]
                        && match kinds[at] {
                            Kind::Dead => false,
                            Kind::Cut => true,
                            Kind::Open => chosen(level, b, h, at.0, at.1),
                        }
                }));
            }
        });
        refined
    }

    /// What every token chooses: at each level so many blocks for each row as `rates` says, one number or one for each head; `budget` says
    /// which finest blocks are forced.
    pub fn select(&self, rates: &[Vec<f64>], budget: &Budget) -> Refined {
        let mut refined: Refined = self.levels().iter().map(|level| level.selection(|_, _, _, _| false)).collect();
        self.for_heads(|b, h, heads| {
            let forced = forced(&heads[heads.len() - 1], budget);
            for (level, head) in heads.iter().enumerate() {
                let candidates = self.candidates(heads, level, |level, at| refined[level][b][[h, at.0, at.1]]);
                let (kinds, c, ratio) = (head.kinds(), head.pooled_logits(), self.ratio(level));
                let wanted = rounded(rates[level][h.min(rates[level].len() - 1)]).max(1);
                for t in 0..c.nrows() {
                    let alive: Vec<usize> =
                        (0..c.ncols()).filter(|&j| candidates[[t, j]] && kinds[[t, j]] != Kind::Dead).collect();
                    let holds_forced = |j: usize| forced[t].iter().any(|&f| f.div_euclid(ratio as i128) == j as i128);
                    let (taken, mut free): (Vec<usize>, Vec<usize>) =
                        alive.into_iter().partition(|&j| kinds[[t, j]] == Kind::Cut || holds_forced(j));
                    let rest = wanted.saturating_sub(taken.len());
                    let below = heads.get(level + 1).map(|below| (below, ratio / self.ratio(level + 1)));
                    rank(head, below, t, c.row(t), rest, &mut free);
                    for j in taken.into_iter().chain(free.into_iter().take(rest)) {
                        refined[level][b][[h, t, j]] = true;
                    }
                }
            }
        });
        refined
    }

    /// Whether rounding decides what some 8-bit codes are: those of a block of two members of which one counts twice. Their differences from
    /// the block's mean are as 1 to 2, so where the larger one has the code 127, the other one is the middle of two codes.
    pub fn rounding_decides(&self) -> bool {
        let levels = self.levels();
        let segments: Vec<Vec<Segment>> = levels.iter().map(Attention::segments).collect();
        levels.windows(2).zip(segments.windows(2)).any(|(levels, segments)| {
            let children = levels[0].block_size / levels[1].block_size;
            segments[1].iter().flat_map(|segment| segment.keys.chunks(children)).any(|members| {
                let counts: Vec<usize> = members.iter().map(Vec::len).filter(|&count| count > 0).collect();
                matches!(counts[..], [a, b] if a == 2 * b || b == 2 * a)
            })
        })
    }

    /// `out` and `lse` of all queries.
    pub fn forward(&self, refined: &Refined) -> (Array4<f64>, Array3<f64>) {
        let (batch, heads, length, _) = self.attention.query.dim();
        let mut out = Array4::zeros((batch, heads, length, self.attention.value.dim().3));
        let mut lse = Array3::from_elem((batch, heads, length), f64::NEG_INFINITY);
        self.for_heads(|b, h, heads| {
            let levels = self.pooled(heads, |level, at| refined[level][b][[h, at.0, at.1]]);
            let finest = &heads[heads.len() - 1];
            let exact = refined[heads.len() - 1][b].index_axis(Axis(0), h);
            let mut out = out.slice_mut(s![b, h, .., ..]);
            for t in finest.segment.rows.iter().flat_map(|row| &row.queries).copied() {
                // The logit, how many keys it stands for, and their value.
                let mut terms: Vec<_> =
                    exact_keys(finest, exact, t).map(|s| (finest.logit(t, s), 1.0, finest.value.row(s))).collect();
                for level in &levels {
                    let coarse = (0..level.coarse.ncols()).filter(|&j| level.coarse[[t, j]]);
                    terms.extend(coarse.map(|j| (level.logits[[t, j]], level.count(j), level.values.row(j))));
                }
                if !terms.is_empty() {
                    let highest = terms.iter().map(|term| term.0).chain(finest.sink).fold(f64::NEG_INFINITY, f64::max);
                    let sink = finest.sink.map_or(0.0, |sink| (sink - highest).exp());
                    let z = terms.iter().map(|(logit, count, _)| count * (logit - highest).exp()).sum::<f64>() + sink;
                    for (logit, count, value) in terms {
                        add(&mut out, t, count * (logit - highest).exp() / z, value);
                    }
                    lse[[b, h, t]] = highest + z.ln();
                }
            }
        });
        (out, lse)
    }

    /// The gradients of query, key, value, sinks and bias for a fixed selection.
    pub fn backward(&self, refined: &Refined, saved: &Saved<'_>) -> Gradients {
        let (batch, heads, queries, _) = self.attention.query.dim();
        let keys = self.attention.key.dim().2;
        let mut to = Gradients {
            query: Array4::zeros(self.attention.query.raw_dim()),
            key: Array4::zeros(self.attention.key.raw_dim()),
            value: Array4::zeros(self.attention.value.raw_dim()),
            sinks: Array2::zeros((batch, heads)),
            bias: Array4::zeros((batch, heads, queries, keys)),
        };
        self.for_heads(|b, h, heads| {
            let (kv, finest) = (self.attention.kv_head(h), &heads[heads.len() - 1]);
            let mut levels = self.pooled(heads, |level, at| refined[level][b][[h, at.0, at.1]]);
            let exact = refined[heads.len() - 1][b].index_axis(Axis(0), h);
            let (mut dq, mut dk) = (to.query.slice_mut(s![b, h, .., ..]), to.key.slice_mut(s![b, kv, .., ..]));
            let (mut dv, mut db) = (to.value.slice_mut(s![b, kv, .., ..]), to.bias.slice_mut(s![b, h, .., ..]));
            for t in finest.segment.rows.iter().flat_map(|row| &row.queries).copied() {
                let (g, lse) = (saved.grad_out.slice(s![b, h, t, ..]), saved.lse[[b, h, t]]);
                let gl = saved.grad_lse.map_or(0.0, |gl| gl[[b, h, t]]);
                if gl == 0.0 && g.iter().all(|&x| x == 0.0) {
                    continue;
                }
                let (q, delta) = (finest.query.row(t), dot(g, saved.out.slice(s![b, h, t, ..])) - gl);
                if let Some(sink) = finest.sink.filter(|_| lse > f64::NEG_INFINITY) {
                    to.sinks[[b, h]] -= (sink - lse).exp() * delta;
                }
                for s in exact_keys(finest, exact, t) {
                    let p = (finest.logit(t, s) - lse).exp();
                    let ds = p * (dot(g, finest.value.row(s)) - delta);
                    let factor = ds * finest.product_slope(q, finest.key.row(s));
                    add(&mut dq, t, factor, finest.key.row(s));
                    add(&mut dk, s, factor, q);
                    add(&mut dv, s, p, g);
                    db[[t, s]] += ds;
                }
                for level in &mut levels {
                    for j in (0..level.coarse.ncols()).filter(|&j| level.coarse[[t, j]]) {
                        let p = level.count(j) * (level.logits[[t, j]] - lse).exp();
                        let dc = p * (dot(g, level.values.row(j)) - delta);
                        let factor = dc * finest.product_slope(q, level.keys.row(j));
                        add(&mut dq, t, factor, level.keys.row(j));
                        add(&mut level.dkh.view_mut(), j, factor, q);
                        add(&mut level.dvh.view_mut(), j, p, g);
                        level.blocks[j].iter().for_each(|&s| db[[t, s]] += dc / level.blocks[j].len() as f64);
                    }
                }
            }
            for level in levels {
                spread(&level.dkh, level.blocks.iter(), &mut dk);
                spread(&level.dvh, level.blocks.iter(), &mut dv);
            }
        });
        to
    }

    /// How many finest blocks lie side by side in a block of a level.
    fn ratio(&self, level: usize) -> usize {
        self.coarser.get(level).map_or(1, |size| size / self.attention.block_size)
    }

    /// What the rows of a level choose among: all blocks at the coarsest one, and else the children of what is refined above.
    fn candidates(&self, heads: &[Head<'_>], level: usize, refined: impl Fn(usize, (usize, usize)) -> bool) -> Array2<bool> {
        let segment = heads[level].segment;
        let children = level.checked_sub(1).map(|above| self.ratio(above) / self.ratio(level));
        Array2::from_shape_fn((segment.rows.len(), segment.keys.len()), |(t, j)| {
            children.is_none_or(|children| refined(level - 1, (t, j / children)))
        })
    }

    /// The means of every level, and which blocks enter with theirs.
    fn pooled<'h>(&self, heads: &'h [Head<'_>], refined: impl Fn(usize, (usize, usize)) -> bool) -> Vec<PooledLevel<'h>> {
        let of_level = |(level, head): (usize, &'h Head<'_>)| {
            let (candidates, kinds, blocks) = (self.candidates(heads, level, &refined), head.kinds(), &head.segment.keys);
            let is_coarse = |at| head.mode == Mode::Full && candidates[at] && kinds[at] == Kind::Open && !refined(level, at);
            let (keys, values) = (pool(head.key, blocks.iter()), pool(head.value, blocks.iter()));
            PooledLevel {
                blocks,
                coarse: Array2::from_shape_fn(kinds.raw_dim(), is_coarse),
                logits: head.pooled_logits(),
                dkh: Array2::zeros(keys.raw_dim()),
                dvh: Array2::zeros(values.raw_dim()),
                keys,
                values,
            }
        };
        heads.iter().enumerate().map(of_level).collect()
    }
}

/// The means of the blocks of a level, and their gradients.
struct PooledLevel<'h> {
    blocks: &'h [Vec<usize>],
    /// Which blocks enter a row's sums with their mean.
    coarse: Array2<bool>,
    logits: Array2<f64>,
    keys: Array2<f64>,
    values: Array2<f64>,
    dkh: Array2<f64>,
    dvh: Array2<f64>,
}

impl PooledLevel<'_> {
    fn count(&self, j: usize) -> f64 {
        self.blocks[j].len() as f64
    }
}

/// The keys that a query computes exactly.
fn exact_keys<'h>(head: &'h Head<'_>, exact: ArrayView2<'h, bool>, t: usize) -> impl Iterator<Item = usize> {
    let blocks = (0..head.segment.keys.len()).filter(move |&j| exact[[t, j]]);
    blocks.flat_map(move |j| head.segment.keys[j].iter().copied().filter(move |&s| head.sees(t, s)))
}

/// The places of the finest blocks that are forced for each row, whether there is a block or not.
fn forced(head: &Head<'_>, budget: &Budget) -> Vec<Vec<i128>> {
    let kinds = head.kinds();
    let by_diagonal = if budget.diagonal_blocks > 0 { budget.diagonal_blocks / 2 + 1 } else { 1 };
    let reach = budget.local_blocks.max(by_diagonal) as i128 - 1;
    let of_row = |t: usize| {
        let own = head.segment.own_block(t);
        let alive = (0..kinds.ncols()).filter(|&j| kinds[[t, j]] != Kind::Dead).map(|j| j as i128);
        (own - reach..=own + reach).chain(alive.take(budget.first_blocks.unwrap_or(1))).collect()
    };
    (0..kinds.nrows()).map(of_row).collect()
}
