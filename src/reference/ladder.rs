//! Several levels of blocks in the block form (section 5 of the definitions), pair by pair of a query and a key: the coarsest level at
//! which the block around a pair is not refined says what the pair adds, and where there is none the pair is exact.

use ndarray::{Array2, Array3, Array4, s};

use super::head::{Head, HeadGradients, Saved as HeadSaved, add, dot, pool, spread};
use super::segment::{Kind, Segment};
use super::select::{higher_first, rounded};
use super::{Attention, Form, Gradients, Saved};
use crate::{Budget, Mode};

/// The same inputs with blocks of several sizes.
#[derive(Debug, Clone)]
pub struct Ladder<'a> {
    /// The coarsest level first.
    levels: Vec<Attention<'a>>,
}

/// For each level and batch item which blocks are refined, `(H, rows, nk)`; at the last level these are exact.
pub type Refined = Vec<Vec<Array3<bool>>>;

/// What a pair of a query and a key adds.
#[derive(Debug, Clone, Copy)]
enum Pair {
    Exact,
    /// Its share of block `(i, j)` of a level.
    Coarse {
        level: usize,
        i: usize,
        j: usize,
    },
}

/// One head at all levels.
struct HeadLevels<'a> {
    heads: Vec<Head<'a>>,
    /// For each level the row of each query and the block of each key.
    rows: Vec<Vec<Option<usize>>>,
    blocks: Vec<Vec<Option<usize>>>,
}

impl<'a> Ladder<'a> {
    /// Blocks of `sizes` tokens, the largest first. Nothing but padding may be hidden.
    ///
    /// # Panics
    /// If a batch item has the token form.
    pub fn new(attention: &Attention<'a>, sizes: &[usize]) -> Self {
        let levels: Vec<_> = sizes.iter().map(|&block_size| Attention { block_size, ..*attention }).collect();
        assert!(levels[0].forms().iter().all(|&form| form == Form::Block), "the block form");
        Self { levels }
    }

    /// The blocks that are refined when each head chooses for itself, with a budget for each level.
    pub fn select(&self, budgets: &[Budget]) -> Refined {
        let mut refined: Refined = self.levels.iter().map(|level| level.selection(|_, _, _, _| false)).collect();
        self.for_heads(|b, h, head| {
            for (level, budget) in budgets.iter().enumerate() {
                let above = level.checked_sub(1).map(|above| refined[above][b].slice(s![h, .., ..]).to_owned());
                let chosen = head.select(level, budget, h, above.as_ref());
                refined[level][b].slice_mut(s![h, .., ..]).assign(&chosen);
            }
        });
        refined
    }

    /// `out` and `lse` of all queries.
    pub fn forward(&self, refined: &Refined) -> (Array4<f64>, Array3<f64>) {
        let (batch, heads, length, _) = self.levels[0].query.dim();
        let mut out = Array4::zeros((batch, heads, length, self.levels[0].value.dim().3));
        let mut lse = Array3::from_elem((batch, heads, length), f64::NEG_INFINITY);
        self.for_heads(|b, h, head| {
            let means: Vec<(Array2<f64>, Array2<f64>)> =
                head.heads.iter().map(|level| (level.pooled_logits(), pool(level.value, level.segment.keys.iter()))).collect();
            let refined = of_head(refined, b, h);
            let finest = &head.heads[head.heads.len() - 1];
            for t in 0..length {
                let terms: Vec<_> = head
                    .pairs(&refined, t)
                    .map(|(s, pair)| match pair {
                        Pair::Exact => (finest.logit(t, s), finest.value.row(s)),
                        Pair::Coarse { level, i, j } => (means[level].0[[i, j]], means[level].1.row(j)),
                    })
                    .collect();
                if terms.is_empty() {
                    continue;
                }
                let highest = terms.iter().map(|term| term.0).chain(finest.sink).fold(f64::NEG_INFINITY, f64::max);
                let sink = finest.sink.map_or(0.0, |sink| (sink - highest).exp());
                let z = terms.iter().map(|(logit, _)| (logit - highest).exp()).sum::<f64>() + sink;
                for (logit, value) in terms {
                    add(&mut out.slice_mut(s![b, h, .., ..]), t, (logit - highest).exp() / z, value);
                }
                lse[[b, h, t]] = highest + z.ln();
            }
        });
        (out, lse)
    }

    /// The gradients of query, key, value, sinks and bias for a fixed selection.
    pub fn backward(&self, refined: &Refined, saved: &Saved<'_>) -> Gradients {
        let attention = &self.levels[0];
        let mut gradients = attention.no_gradients();
        self.for_heads(|b, h, head| {
            let kv = attention.kv_head(h);
            let saved = HeadSaved {
                out: saved.out.slice(s![b, h, .., ..]),
                lse: saved.lse.slice(s![b, h, ..]),
                grad_out: saved.grad_out.slice(s![b, h, .., ..]),
                grad_lse: saved.grad_lse.as_ref().map(|grad_lse| grad_lse.slice(s![b, h, ..])),
            };
            let mut to = HeadGradients {
                query: gradients.query.slice_mut(s![b, h, .., ..]),
                key: gradients.key.slice_mut(s![b, kv, .., ..]),
                value: gradients.value.slice_mut(s![b, kv, .., ..]),
                sink: &mut gradients.sinks[[b, h]],
                bias: gradients.bias.slice_mut(s![b, h, .., ..]),
            };
            head.backward(&of_head(refined, b, h), &saved, &mut to);
        });
        gradients
    }

    fn for_heads(&self, mut body: impl FnMut(usize, usize, &HeadLevels<'_>)) {
        let (batch, heads, queries, _) = self.levels[0].query.dim();
        for b in 0..batch {
            let segments: Vec<Segment> = self.levels.iter().map(|level| Segment::new(level, b)).collect();
            let place = |of: Vec<&Vec<usize>>, length: usize| {
                let mut places = vec![None; length];
                of.iter().enumerate().for_each(|(block, tokens)| tokens.iter().for_each(|&token| places[token] = Some(block)));
                places
            };
            let rows = |segment: &Segment| place(segment.rows.iter().map(|row| &row.queries).collect(), queries);
            let blocks = |segment: &Segment| place(segment.keys.iter().collect(), self.levels[0].key.dim().2);
            for h in 0..heads {
                let head = HeadLevels {
                    heads: self.levels.iter().zip(&segments).map(|(level, segment)| level.head(segment, b, h)).collect(),
                    rows: segments.iter().map(rows).collect(),
                    blocks: segments.iter().map(blocks).collect(),
                };
                body(b, h, &head);
            }
        }
    }
}

impl HeadLevels<'_> {
    /// The keys that count for a query, each with what the pair adds.
    fn pairs<'s>(&'s self, refined: &'s [Array2<bool>], t: usize) -> impl Iterator<Item = (usize, Pair)> + 's {
        let answers = self.rows[0][t].is_some();
        let full = self.heads[0].mode == Mode::Full;
        let keys = (0..self.blocks[0].len()).filter(move |&s| answers && self.blocks[0][s].is_some());
        let pair = move |s: usize| {
            let places = self.rows.iter().zip(&self.blocks).map(|(rows, blocks)| (rows[t].unwrap(), blocks[s].unwrap()));
            let left_out = places.enumerate().find(|&(level, (i, j))| !refined[level][[i, j]]);
            left_out.map_or(Pair::Exact, |(level, (i, j))| Pair::Coarse { level, i, j })
        };
        keys.map(move |s| (s, pair(s))).filter(move |(_, pair)| full || matches!(pair, Pair::Exact))
    }

    fn backward(&self, refined: &[Array2<bool>], saved: &HeadSaved<'_>, to: &mut HeadGradients<'_>) {
        let finest = &self.heads[self.heads.len() - 1];
        let logits: Vec<Array2<f64>> = self.heads.iter().map(Head::pooled_logits).collect();
        let means: Vec<_> = self
            .heads
            .iter()
            .map(|level| {
                let keys = &level.segment.keys;
                (level.query_means(), pool(level.key, keys.iter()), pool(level.value, keys.iter()))
            })
            .collect();
        let mut of_logits: Vec<Array2<f64>> = logits.iter().map(|logits| Array2::zeros(logits.raw_dim())).collect();
        let mut of_values: Vec<Array2<f64>> = means.iter().map(|(_, _, vh)| Array2::zeros(vh.raw_dim())).collect();
        for t in 0..finest.query.nrows() {
            let Some(delta) = saved.delta(t).filter(|_| self.rows[0][t].is_some()) else { continue };
            let (g, lse) = (saved.grad_out.row(t), saved.lse[t]);
            if let Some(sink) = finest.sink.filter(|_| lse > f64::NEG_INFINITY) {
                *to.sink -= (sink - lse).exp() * delta;
            }
            for (s, pair) in self.pairs(refined, t) {
                match pair {
                    Pair::Exact => {
                        let p = (finest.logit(t, s) - lse).exp();
                        let ds = p * (dot(g, finest.value.row(s)) - delta);
                        let factor = ds * finest.product_slope(finest.query.row(t), finest.key.row(s));
                        add(&mut to.query, t, factor, finest.key.row(s));
                        add(&mut to.key, s, factor, finest.query.row(t));
                        add(&mut to.value, s, p, g);
                        to.bias[[t, s]] += ds;
                    }
                    Pair::Coarse { level, i, j } => {
                        let p = (logits[level][[i, j]] - lse).exp();
                        of_logits[level][[i, j]] += p * (dot(g, means[level].2.row(j)) - delta);
                        add(&mut of_values[level].view_mut(), j, p, g);
                    }
                }
            }
        }
        for (level, head) in self.heads.iter().enumerate() {
            let ((qh, kh, _), (rows, keys)) = (&means[level], (&head.segment.rows, &head.segment.keys));
            let (mut dqh, mut dkh) = (Array2::zeros(qh.raw_dim()), Array2::zeros(kh.raw_dim()));
            for ((i, j), &dc) in of_logits[level].indexed_iter().filter(|(_, dc)| **dc != 0.0) {
                let factor = dc * head.product_slope(qh.row(i), kh.row(j));
                add(&mut dqh.view_mut(), i, factor, kh.row(j));
                add(&mut dkh.view_mut(), j, factor, qh.row(i));
                for (&t, &s) in rows[i].pooled.iter().flat_map(|t| keys[j].iter().map(move |s| (t, s))) {
                    to.bias[[t, s]] += dc / (rows[i].pooled.len() * keys[j].len()) as f64;
                }
            }
            spread(&dqh, rows.iter().map(|row| &row.pooled), &mut to.query);
            spread(&dkh, keys.iter(), &mut to.key);
            spread(&of_values[level], keys.iter(), &mut to.value);
        }
    }

    /// The blocks of a level that are refined, given those of the level above.
    fn select(&self, level: usize, budget: &Budget, h: usize, above: Option<&Array2<bool>>) -> Array2<bool> {
        let (head, segment) = (&self.heads[level], self.heads[level].segment);
        let ratio = segment.size_in(self.heads[self.heads.len() - 1].segment);
        let (kinds, c) = (head.kinds(), head.pooled_logits());
        let is_candidate = |row: usize, j: usize| {
            kinds[[row, j]] == Kind::Open
                && above.is_none_or(|above| {
                    let (t, s) = (segment.rows[row].queries[0], segment.keys[j][0]);
                    above[[self.rows[level - 1][t].unwrap(), self.blocks[level - 1][s].unwrap()]]
                })
        };
        let rate = budget.blocks_per_row[h.min(budget.blocks_per_row.len() - 1)];
        let mut selected = Array2::from_elem(c.raw_dim(), false);
        let (mut free, mut beyond, mut live) = (Vec::new(), Vec::new(), 0);
        for (row, i) in (0..c.nrows()).zip(segment.first_row..) {
            let candidates: Vec<usize> = (0..c.ncols()).filter(|&j| is_candidate(row, j)).collect();
            let best = candidates.iter().map(|&j| c[[row, j]]).fold(f64::NEG_INFINITY, f64::max);
            // Without a number among the logits, the first block is as good as any.
            let first_best = candidates.iter().copied().find(|&j| c[[row, j]] == best).or(candidates.first().copied());
            if !segment.rows[row].live {
                beyond.push((row, candidates, first_best));
                continue;
            }
            live += candidates.len();
            for j in candidates {
                if Some(j) == first_best || forces(budget, i, j as i128, ratio) {
                    selected[[row, j]] = true;
                } else {
                    free.push((c[[row, j]] - best, row, j));
                }
            }
        }
        let forced = live - free.len();
        let wanted = rounded(rate * segment.query_blocks as f64);
        let rest = wanted.saturating_sub(forced);
        let filled = segment.keys.iter().filter(|keys| !keys.is_empty()).count();
        // Where blocks are refined further, rows of padded queries take all of them only if the budget itself reaches so far.
        let all = if ratio == 1 { free.len() <= rest } else { live <= wanted && filled as f64 <= rate.ceil() };
        free.sort_by(|a, b| higher_first(a.0, b.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        for (_, row, j) in free.into_iter().take(rest) {
            selected[[row, j]] = true;
        }
        for (row, candidates, first_best) in beyond {
            for j in candidates {
                selected[[row, j]] = all || Some(j) == first_best;
            }
        }
        selected
    }
}

fn of_head(refined: &Refined, b: usize, h: usize) -> Vec<Array2<bool>> {
    refined.iter().map(|level| level[b].slice(s![h, .., ..]).to_owned()).collect()
}

/// Whether one of the finest blocks in block `(i, j)` is forced.
fn forces(budget: &Budget, i: i128, j: i128, ratio: i128) -> bool {
    let first = budget.first_blocks.unwrap_or(0) as i128;
    (i * ratio..(i + 1) * ratio).any(|row| {
        (j * ratio..(j + 1) * ratio).any(|block| {
            let distance = (row - block).unsigned_abs();
            (budget.diagonal_blocks > 0 && distance <= budget.diagonal_blocks as u128 / 2)
                || (budget.local_blocks > 1 && distance < budget.local_blocks as u128)
                || row < first
                || block < first
        })
    })
}
