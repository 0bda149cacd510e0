//! The gradients of the sinks against the formulas.

use mra_attention::{Gradients, Inputs, Saved, backward};
use ndarray::{Array3, Array4, Axis};

use crate::support::{CAUSAL, Case, Expected, Layout, Padding, Setup, Stored, budget, levels, plan_of, with_problem};

/// In both forms, with padding, and for queries of no gradient.
#[test]
fn gradients_are_those_of_the_formulas() {
    let base = Case { batch: 2, kv_heads: 2, group: 2, query_len: 21, key_len: 30, sinks: true, ..Case::default() };
    let cases = [
        base.clone(),
        Case { window: CAUSAL, ..base.clone() },
        Case { key_padding: Padding::Holes, query_padding: Padding::Left, ..base.clone() },
        Case { window: CAUSAL, softcap: Some(0.8), alibi: true, budget: budget(1.0), ..base.clone() },
        Case { query_padding: Padding::All, ..base.clone() },
        Case { grad_lse: false, ..base },
    ];
    for case in cases {
        let data = case.data::<f64>();
        let expected = Expected::new::<f64>(&case, &data);
        for level in levels() {
            let setup = Setup { threads: 3, ..Setup::new(level) };
            let sinks = with_problem(&case, &data, setup, |problem| {
                let store = |array: &Array4<f64>| Stored::<f64>::new(array.view(), Layout::Contiguous);
                let rows = |array: &Array3<f64>| Stored::<f64>::new(array.view().insert_axis(Axis(3)), Layout::Contiguous);
                let [query, key, value, grad_out] = [&data.query, &data.key, &data.value, &data.grad_out].map(store);
                let (out, lse, grad_lse) =
                    (store(&expected.saved_out), rows(&expected.saved_lse), data.grad_lse.as_ref().map(rows));
                let inputs = Inputs { query: query.tensor("query"), key: key.tensor("key"), value: value.tensor("value") };
                let saved = Saved {
                    grad_out: grad_out.tensor("grad_out"),
                    grad_lse: grad_lse.as_ref().map(|grad_lse| grad_lse.tensor("grad_lse")),
                    out: out.tensor("out"),
                    lse: lse.tensor("lse"),
                };
                let mut grads =
                    [&data.query, &data.key, &data.value].map(|array| Stored::<f64>::unset(array.dim(), Layout::Contiguous));
                let [grad_query, grad_key, grad_value] = &mut grads;
                let mut sinks = vec![f64::NAN; case.batch * case.heads()];
                let mut gradients = Gradients {
                    query: grad_query.tensor_mut("grad_query"),
                    key: grad_key.tensor_mut("grad_key"),
                    value: grad_value.tensor_mut("grad_value"),
                    bias: None,
                    sinks: Some(&mut sinks),
                };
                backward(problem, &inputs, &saved, &plan_of(problem, &expected.selected), &mut gradients)
                    .expect("a valid case");
                sinks
            });
            for (ours, exact) in sinks.iter().zip(&expected.gradients.sinks) {
                assert!((ours - exact).abs() <= 1e-10 * exact.abs().max(1.0), "{ours} for {exact}: {case:?}");
            }
        }
    }
}
